"""Run two ranks: rank 0 closes its backend at once while rank 1 still reduces in its own group."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from distributed.backends.make import make_backend
from distributed.topology import find_topology

topology = find_topology()
backend = make_backend("horovod", topology, torch.device("cpu"), timeout_s=60.0, rank_groups=[[0], [1]])
group = backend.group([[0], [1]])
if topology.rank == 1:
    # Rank 0 is in close() by now.
    time.sleep(2.0)
    for number in range(10):
        x = torch.ones(1000)
        backend.all_reduce_(x, f"late.{number}", group)
    print("reduced while rank 0 was closing", flush=True)
backend.close()

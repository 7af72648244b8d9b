"""Run two ranks: rank 1 is stopped while rank 0 enqueues a tensor; other threads of rank 0 must continue."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from distributed.backends.make import make_backend
from distributed.topology import find_topology

topology = find_topology()
backend = make_backend("horovod", topology, torch.device("cpu"), timeout_s=60.0, rank_groups=[[0], [1]])
pids = backend.all_gather_objects(os.getpid())
if topology.rank == 0:
    handing_in = threading.Event()

    def watch() -> None:
        handing_in.wait()
        time.sleep(2.0)
        print("the other thread of rank 0 went on", flush=True)
        os.kill(pids[1], signal.SIGCONT)

    threading.Thread(target=watch).start()
    os.kill(pids[1], signal.SIGSTOP)
    # If Horovod's thread waits for rank 1 at all, it has reached that point by now.
    time.sleep(1.0)
    handing_in.set()
x = torch.ones(3)
backend.all_reduce_(x, "test.stopped")
assert x.tolist() == [2.0] * 3
backend.close()

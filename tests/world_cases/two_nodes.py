"""Join a world of two nodes in several ways, in one process per node: tests/distributed/test_two_nodes.py starts both.

Each case sets the node's hosts file and environment, joins, starts the control channel, adds 1 over all ranks, and leaves. The
result of a case is the sum, and on rank 0 the addresses on which the whole job listens; or the error. Ends at the first error.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from distributed.backends.make import make_backend
from distributed.health.control_channel import ControlChannel
from distributed.topology import TopologyError, find_topology
from tests.helpers.processes import listening, processes_with
from tests.helpers.worlds import MARK


def main(hosts: Path, cases: list[dict[str, Any]], results: Path) -> None:
    inherited = dict(os.environ)
    done: dict[str, Any] = {}
    for case in cases:
        os.environ.clear()
        os.environ.update(inherited | case["environment"])
        # Bound over /etc/hosts, so it must stay the same file.
        hosts.write_text(case["hosts"])
        try:
            done[case["name"]] = join(case["backend"])
        except (TopologyError, RuntimeError) as error:
            done[case["name"]] = f"{type(error).__name__}: {error}"
        results.write_text(json.dumps(done))
        if isinstance(done[case["name"]], str):
            # A failed communicator may wait for the other node when it is destroyed.
            os._exit(0)


def join(name: str) -> tuple[float, list[tuple[str, str]]]:
    topology = find_topology()
    backend = make_backend(name, topology, torch.device("cpu"), 60.0, "gloo")
    control = ControlChannel(backend)
    found = listening(processes_with(MARK, os.environ[MARK])) if topology.rank == 0 else set()
    # The other rank waits here.
    x = torch.ones(1)
    backend.all_reduce_(x, "x")
    control.close()
    backend.close()
    return x.item(), sorted(found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))

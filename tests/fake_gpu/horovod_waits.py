"""Print, on rank 0 of a Horovod job on the fake GPU, the host's waits for the device in ten reductions."""

import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent.parent


def main() -> None:
    sys.path.insert(0, str(CHECKOUT))
    import torch

    from distributed.backends.horovod import HorovodBackend
    from distributed.backends.make import pick_device
    from distributed.topology import find_topology
    from tests.fake_gpu.counters import counts

    topology = find_topology()
    backend = HorovodBackend(topology, pick_device("cuda", topology), timeout_s=60)
    x = torch.zeros(1000, device=backend.device)
    for number in range(11):
        # The first reduction creates communicators.
        if number == 1:
            before = counts()
        backend.all_reduce_(x, f"reduction {number}")
    # Horovod's background thread counts too.
    time.sleep(0.2)
    after = counts()
    if topology.rank == 0:
        waits = sum(after[name] - before[name] for name in ("event_waits", "spinning_waits", "stream_waits"))
        print(f"waits: {waits}, collectives: {after['collectives'] - before['collectives']}")
    backend.close()


if __name__ == "__main__":
    main()

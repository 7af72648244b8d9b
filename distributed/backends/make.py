"""Choose the backend and the device of this process."""

from collections.abc import Sequence

import torch

from distributed.topology import Topology, TopologyError, choose_gpu

from .base import Backend
from .single import SingleBackend


def pick_device(wanted: str, topology: Topology) -> torch.device:
    """Return this process' device: its own GPU among the visible ones, or the CPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", choose_gpu(torch.cuda.device_count(), topology))
    torch.cuda.set_device(device)
    return device


def make_backend(
    name: str,
    topology: Topology,
    device: torch.device,
    timeout_s: float,
    controller: str = "auto",
    rank_groups: Sequence[Sequence[int]] = (),
) -> Backend:
    """Join the world.

    `controller` and `rank_groups` are for Horovod. `rank_groups`: all groups that `Backend.group` will be asked for, the same
    list on all ranks. Raises TopologyError when the processes are not those that the launcher announced.
    """
    if name == "single":
        return SingleBackend(topology, device)
    if name == "torch":
        from .ddp import TorchBackend

        return TorchBackend(topology, device, timeout_s)
    try:
        from .horovod import HorovodBackend
    except ImportError as error:
        raise TopologyError(
            f"distributed.backend=horovod, but Horovod cannot be imported ({error}). Fix: make horovod"
        ) from error
    return HorovodBackend(topology, device, timeout_s, controller, rank_groups)

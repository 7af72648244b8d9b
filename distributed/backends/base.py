"""What the rest of the project may ask of a world of processes, and the world of one.

Three backends fulfil the protocol: `SingleBackend` here, `TorchBackend` and `HorovodBackend` in files of their own.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distributed.topology import Topology


@dataclass(frozen=True)
class Group:
    """Ranks that reduce among themselves; `handle` is the backend's own."""

    ranks: tuple[int, ...]
    handle: Any = None


class Reducer(Protocol):
    """Averages gradients over ranks and micro-steps.

    Run every forward pass through `network`, and each micro-step's forward and backward inside `micro_step`. After `finish`,
    `.grad` of each parameter holds the mean over ranks of what the micro-steps summed up: unscaled, uncompressed, and in the
    parameter's memory layout.
    """

    network: nn.Module

    def micro_step(self, last: bool) -> AbstractContextManager[None]: ...

    def finish(self) -> None: ...


class Backend(Protocol):
    """A world of processes. All collectives must be called by all ranks (of the group) in the same order."""

    name: str
    topology: Topology
    device: torch.device
    waited_s: float
    """Host time in `all_reduce_` so far, most of it waiting for other ranks."""

    def all_reduce_(self, x: Tensor, name: str, group: Group | None = None) -> None:
        """Sum a contiguous tensor over the group (None: the world), in place; `name` is unique among those in flight."""

    def broadcast_(self, x: Tensor, name: str) -> None:
        """Copy rank 0's contiguous tensor to all, in place."""

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's small picklable object."""

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Every rank's small picklable object, by rank."""

    def group(self, rank_groups: Sequence[Sequence[int]]) -> Group | None:
        """This rank's one of several disjoint groups; all ranks call it with the same list. Over Horovod these are among those
        that it was made with (ValueError)."""

    def reducer(self, network: nn.Module, options: "ReducerOptions") -> Reducer: ...

    def barrier(self) -> None: ...

    def close(self) -> None:
        """Leave the world in good order; all ranks call it."""


@dataclass(frozen=True)
class ReducerOptions:
    """`accumulation`: micro-steps to a step. `half_wire`: send fp16. `deterministic`: sums do not depend on arrival order."""

    accumulation: int = 1
    half_wire: bool = False
    deterministic: bool = False


def broadcast_network(backend: Backend, network: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers, one message for each type of number."""
    tensors = [tensor.detach() for tensor in network.state_dict(keep_vars=True).values()]
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        of_type = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in of_type])
        backend.broadcast_(flat, f"network.{dtype}")
        for tensor, part in zip(of_type, flat.split([tensor.numel() for tensor in of_type]), strict=True):
            tensor.copy_(part.view(tensor.shape))

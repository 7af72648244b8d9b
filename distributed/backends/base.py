"""The backend protocol: the operations that the rest of the project may ask of a world of processes."""

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


@dataclass(frozen=True)
class ReducerOptions:
    """Options of a reducer."""

    accumulation: int = 1
    """Micro-steps per step."""
    fp16_compression: bool = False
    """Send gradients as fp16."""
    deterministic: bool = False
    """Sum in an order that does not depend on the order in which gradients become ready."""


class Reducer(Protocol):
    """Averages gradients over ranks and micro-steps.

    Run every forward pass through `network`, and each micro-step's forward and backward inside `micro_step`. After `finish`,
    `.grad` of each parameter holds the mean over ranks of the sum over micro-steps: unscaled, uncompressed, and in the
    parameter's memory layout.
    """

    network: nn.Module

    def micro_step(self, last: bool) -> AbstractContextManager[None]: ...

    def finish(self) -> None: ...


class Backend(Protocol):
    """A world of processes. All ranks (of the group) must call its collectives in the same order."""

    name: str
    topology: Topology
    device: torch.device
    waited_s: float
    """Host time spent in `all_reduce_` so far, most of it waiting for other ranks."""

    def all_reduce_(self, x: Tensor, name: str, group: Group | None = None) -> None:
        """Sum a contiguous tensor over the group (None: the world), in place; `name` is unique among those in flight."""

    def broadcast_(self, x: Tensor, name: str) -> None:
        """Copy rank 0's contiguous tensor to all ranks, in place."""

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's small object, which is a JSON value (distributed.backends.objects)."""

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's small object, by rank; each is a JSON value."""

    def group(self, rank_groups: Sequence[Sequence[int]]) -> Group | None:
        """Return this rank's group among several disjoint ones; all ranks call it with the same list.

        Horovod knows only the groups that the backend was made with, and raises ValueError for others.
        """

    def reducer(self, network: nn.Module, options: ReducerOptions) -> Reducer: ...

    def close(self) -> None:
        """Leave the world without harm to other ranks; all ranks call it."""


def broadcast_network(backend: Backend, network: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to every rank, in one message per dtype."""
    tensors = [tensor.detach() for tensor in network.state_dict(keep_vars=True).values()]
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        of_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in of_dtype])
        backend.broadcast_(flat, f"network.{dtype}")
        for tensor, part in zip(of_dtype, flat.split([tensor.numel() for tensor in of_dtype]), strict=True):
            tensor.copy_(part.view(tensor.shape))

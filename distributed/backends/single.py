"""The backend of a job with one process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distributed.topology import Topology

from .base import Group, Reducer, ReducerOptions
from .objects import decode, encode


class SingleBackend:
    """The world of one process: every collective is the identity."""

    name = "single"
    waited_s = 0.0

    def __init__(self, topology: Topology, device: torch.device) -> None:
        self.topology = topology
        self.device = device

    def all_reduce_(self, x: Tensor, name: str, group: Group | None = None) -> None:
        pass

    def broadcast_(self, x: Tensor, name: str) -> None:
        pass

    def broadcast_object(self, value: Any) -> Any:
        # As in a larger world: a value that could not be sent is an error.
        return decode(encode(value))

    def all_gather_objects(self, value: Any) -> list[Any]:
        return [decode(encode(value))]

    def group(self, rank_groups: Sequence[Sequence[int]]) -> Group | None:
        return Group((0,))

    def reducer(self, network: nn.Module, options: ReducerOptions) -> Reducer:
        return _SingleReducer(network)

    def close(self) -> None:
        pass


class _SingleReducer:
    """Leaves `.grad` as backward wrote it: the mean over one rank."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        yield

    def finish(self) -> None:
        pass

"""The backend over torch.distributed: NCCL on GPUs, Gloo on CPUs, started by launch/local.py, torchrun or srun."""

import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.addresses import rendezvous_address, set_interfaces
from distributed.topology import Topology, TopologyError

from .base import Group, Reducer, ReducerOptions
from .fp16_compression import fp16_share
from .gloo_listeners import sealed_afterwards
from .objects import broadcast_json, decode, encode


class TorchBackend:
    """Runs collectives over torch.distributed; see `distributed.backends.base.Backend`."""

    name = "torch"
    waited_s = 0.0

    def __init__(self, topology: Topology, device: torch.device, timeout_s: float) -> None:
        self.topology = topology
        self.device = device
        # Gloo carries the small objects, which are on the CPU.
        transport = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if topology.launcher == "none":
            dist.init_process_group(transport, store=dist.HashStore(), rank=0, world_size=1)
            return
        set_interfaces(topology)
        with sealed_afterwards():
            _join(topology, transport, timedelta(seconds=timeout_s))
        if (dist.get_rank(), dist.get_world_size()) != (topology.rank, topology.size):
            raise TopologyError(
                f"{topology.launcher} set rank {topology.rank} of {topology.size}, but torch.distributed has rank "
                f"{dist.get_rank()} of {dist.get_world_size()}. Fix: start all processes with one launcher"
            )

    def all_reduce_(self, x: Tensor, name: str, group: Group | None = None) -> None:
        started_s = time.perf_counter()
        dist.all_reduce(x, group=None if group is None else group.handle)
        self.waited_s += time.perf_counter() - started_s

    def broadcast_(self, x: Tensor, name: str) -> None:
        dist.broadcast(x, src=0)

    def broadcast_object(self, value: Any) -> Any:
        return broadcast_json(self, value)

    def all_gather_objects(self, value: Any) -> list[Any]:
        text = encode(value)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.topology.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]))
        # Gloo gathers tensors of one size.
        padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(texts, padded)
        return [decode(other[:length]) for other, length in zip(texts, lengths, strict=True)]

    def group(self, rank_groups: Sequence[Sequence[int]]) -> Group | None:
        mine = None
        # Every rank must create every group.
        for ranks in rank_groups:
            with sealed_afterwards():
                handle = dist.new_group(list(ranks))
            if self.topology.rank in ranks:
                mine = Group(tuple(ranks), handle)
        return mine

    def reducer(self, network: nn.Module, options: ReducerOptions) -> Reducer:
        return _DdpReducer(network, self.device, options)

    def close(self) -> None:
        dist.destroy_process_group()


def _join(topology: Topology, transport: str, timeout: timedelta) -> None:
    if topology.launcher == "torchrun":
        # torch would wait for a MASTER_ADDR that does not resolve.
        rendezvous_address(topology)
        dist.init_process_group(transport, timeout=timeout)
    else:
        where = _meeting_place(topology)
        dist.init_process_group(transport, where, timeout, world_size=topology.size, rank=topology.rank)


def _meeting_place(topology: Topology) -> str:
    """Return the URL at which ranks meet: launch/local.py's file, or a port of the node of rank 0."""
    if topology.launcher == "local":
        return f"file://{os.environ['TSM_LOCAL_STORE']}"
    host, port = rendezvous_address(topology)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def without_buffer_sync(ddp: Callable[..., Any] = DistributedDataParallel.__init__) -> dict[str, Any]:
    """Return the keyword argument that stops DistributedDataParallel from broadcasting buffers before each forward pass.

    The argument is `broadcast_buffers` in torch 2.11 and `forward_sync_buffers` in torch 2.14, which warns about the old name.
    """
    names = inspect.signature(ddp).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


class _DdpReducer:
    """A Reducer on DistributedDataParallel, which fuses gradients into buckets and overlaps them with backward."""

    def __init__(self, network: nn.Module, device: torch.device, options: ReducerOptions) -> None:
        # DDP warns about 1 x 1 convolutions, whose strides are ambiguous: both layouts are the same bytes.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified in DDP constructor")
        self._ddp = DistributedDataParallel(
            network,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # DDP rebuilds its buckets after the first step, in arrival order, so a resumed run would sum its first step in
            # other buckets than the original run did. It does not rebuild them when it must find unused parameters.
            find_unused_parameters=options.deterministic,
            # distributed.batch_norm averages the running statistics.
            **without_buffer_sync(),
        )
        self.network: nn.Module = self._ddp
        if options.fp16_compression:
            self._ddp.register_comm_hook(dist.get_world_size(), _reduce_in_fp16)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        with nullcontext() if last else self._ddp.no_sync():
            yield

    def finish(self) -> None:
        """Do nothing: DDP's backward returns after it has reduced the gradients."""


def _reduce_in_fp16(world_size: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over the world in fp16, as a DDP communication hook."""
    gradient = bucket.buffer()
    sent = dist.all_reduce(fp16_share(gradient, world_size), async_op=True)
    return sent.get_future().then(lambda done: gradient.copy_(done.value()[0]))

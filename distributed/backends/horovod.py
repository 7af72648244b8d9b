"""The world over Horovod: NCCL on GPUs, MPI or Gloo on CPUs. Only this file and horovod_rendezvous.py import horovod."""

import atexit
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Read by hvd.init(): a group of gradients is never fused with another, so that the order of a sum does not depend on which
# gradient was ready first (see ReducerOptions.deterministic).
os.environ.setdefault("HOROVOD_DISABLE_GROUP_FUSION", "1")

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from distributed.topology import Topology, TopologyError, choose_controller

from .base import Group, Reducer, ReducerOptions
from .fp16_compression import half_part
from .horovod_rendezvous import prepare_gloo

if not hasattr(hvd, "init"):  # what an installation without its compiled part looks like
    raise ImportError("its extension for torch was not built")

_GROUP_BYTES = 64 << 20  # gradients in one fixed group of the deterministic mode: Horovod's default fusion threshold


class HorovodBackend:
    """See `distributed.backends.base.Backend`."""

    name = "horovod"
    waited_s = 0.0

    def __init__(
        self,
        topology: Topology,
        device: torch.device,
        timeout_s: float,
        controller: str = "auto",
        rank_groups: Sequence[Sequence[int]] = (),
    ) -> None:
        self.topology = topology
        self.device = device
        self._rendezvous = None
        chosen = choose_controller(controller, topology)
        if chosen is not None:  # under srun both would work, and Horovod takes MPI wherever it was built with it
            os.environ["HOROVOD_CONTROLLER"] = os.environ["HOROVOD_CPU_OPERATIONS"] = chosen
        if chosen == "gloo":
            self._rendezvous = prepare_gloo(topology, timeout_s)
        # Its own limit is 30 s: less than a busy node may take, and less than the monitor needs to say who hangs.
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(round(timeout_s)))
        # No dynamic process sets: with them all ranks meet in each of its cycles, and while one does not come, another that hands
        # in a tensor waits for Horovod's lock with Python's in its hands, and its control channel falls silent.
        os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "0"
        if device.type == "cuda":
            # For the host a reduction is done when it is queued, and torch's stream waits for it on the GPU. Without this the host
            # waits for the end of each one, and queues no step ahead. The stream that waits is the default one: we use no other.
            os.environ.setdefault("HOROVOD_ENABLE_ASYNC_COMPLETION", "1")
        everyone = tuple(range(topology.size))
        self._process_sets = {
            ranks: hvd.ProcessSet(list(ranks)) for ranks in map(tuple, rank_groups) if ranks != everyone
        }
        try:
            hvd.init(process_sets=list(self._process_sets.values()))
        except ValueError as error:
            # Startup failed; Horovod's atexit hook would block on the ranks that did start.
            atexit.register(os._exit, 2)
            raise TopologyError(
                f"Horovod does not start among {topology.size} processes of {topology.launcher}: its words are above. Where a rank "
                "is invalid, it was built without what this launcher speaks. Fix: make horovod, with MPI installed for mpirun. "
                "Where process sets are mismatching, ranks have other groups of batch norm. Fix: one configuration for all ranks"
            ) from error
        self._process_sets[everyone] = hvd.global_process_set
        if (hvd.rank(), hvd.size()) != (topology.rank, topology.size):
            raise TopologyError(
                f"{topology.launcher} promised rank {topology.rank} of {topology.size}, Horovod has rank {hvd.rank()} of "
                f"{hvd.size()}: it was built without what this launcher speaks. Fix: make horovod, with MPI installed for mpirun"
            )

        if hvd.mpi_enabled():
            _check_node(topology)

    def all_reduce_(self, x: Tensor, name: str, group: Group | None = None) -> None:
        started_s = time.perf_counter()
        process_set = hvd.global_process_set if group is None else group.handle
        handle = hvd.allreduce_async_(x, name=name, op=hvd.Sum, process_set=process_set)
        _wait(handle)
        hvd.synchronize(handle)
        self.waited_s += time.perf_counter() - started_s

    def broadcast_(self, x: Tensor, name: str) -> None:
        hvd.broadcast_(x, root_rank=0, name=name)

    def broadcast_object(self, value: Any) -> Any:
        # Without a name Horovod takes the value's type for one, which differs where only rank 0 has a value: a deadlock.
        return hvd.broadcast_object(value, root_rank=0, name="object")

    def all_gather_objects(self, value: Any) -> list[Any]:
        values: list[Any] = hvd.allgather_object(value, name="objects")
        return values

    def group(self, rank_groups: Sequence[Sequence[int]]) -> Group | None:
        unknown = [ranks for ranks in map(tuple, rank_groups) if ranks not in self._process_sets]
        if unknown:
            raise ValueError(
                f"Horovod learns of its groups when it starts, and not of {unknown[0]}. Fix: make_backend(rank_groups=)"
            )
        mine = next((ranks for ranks in map(tuple, rank_groups) if self.topology.rank in ranks), None)
        return None if mine is None else Group(mine, self._process_sets[mine])

    def reducer(self, network: nn.Module, options: ReducerOptions) -> Reducer:
        return _HorovodReducer(network, options)

    def barrier(self) -> None:
        hvd.barrier()

    def close(self) -> None:
        hvd.barrier()  # under MPI the others fail if one leaves while they still reduce
        hvd.shutdown()
        if self._rendezvous is not None:
            self._rendezvous.shutdown()


def _check_node(topology: Topology) -> None:
    """Refuse a launcher that places processes otherwise than MPI finds them: two would take one GPU. Needs mpi4py.

    mpi4py joins the MPI that Horovod has started.
    """
    try:
        from mpi4py import MPI
    except ImportError:
        return
    on_node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED, key=topology.rank)
    found = on_node.rank, on_node.size
    on_node.Free()
    if found != (topology.local_rank, topology.local_size):
        raise TopologyError(
            f"{topology.launcher} says local rank {topology.local_rank} of {topology.local_size} on {topology.host}, MPI finds "
            f"{found[0]} of {found[1]} there. Fix: place ranks in blocks (srun --distribution=block, mpirun --map-by slot)"
        )


class _HorovodReducer:
    """Horovod's DistributedOptimizer inside the Reducer protocol: its hooks overlap the reduction with backward.

    The optimizer that it wraps never takes a step.
    """

    def __init__(self, network: nn.Module, options: ReducerOptions) -> None:
        self.network = network
        named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
        parameters = [parameter for _, parameter in named]
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        self._hooks = hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.0),
            named_parameters=named,
            compression=_Compressor(hvd.size(), options.half_wire),
            backward_passes_per_step=options.accumulation,
            op=hvd.Sum,
            groups=-(-num_bytes // _GROUP_BYTES) if options.deterministic else None,
        )

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        yield  # the hooks count micro-steps themselves

    def finish(self) -> None:
        if hvd.size() == 1:
            return
        for handle, _ in list(self._hooks._handles.values()):
            if handle is not None:
                _wait(handle)
        self._hooks.synchronize()


def _wait(handle: int) -> None:
    """Sleep until an operation is done.

    Horovod's own synchronize() spins, and takes a core from the threads that reduce: on 2 cores a step of two processes took
    1.3 to 1.8 times as long as DDP's, and with this wait about as long (benchmarks/step.py).
    """
    pause_s = 20e-6
    while not hvd.poll(handle):
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 500e-6)


class _Compressor:
    """Turns a gradient into what Horovod can send, and back: contiguous, fp32 (or fp64) or fp16, scaled by 1/size.

    Scaled before the sum (see `half_part`), and here, because Horovod's grouped reduction ignores its own pre-scaling.
    """

    def __init__(self, size: int, half_wire: bool) -> None:
        self._size = size
        self._half_wire = half_wire

    def compress(self, gradient: Tensor) -> tuple[Tensor, tuple[torch.dtype, bool]]:
        channels_last = gradient.dim() == 4 and not gradient.is_contiguous()
        dense = gradient.permute(0, 2, 3, 1) if channels_last else gradient
        if not dense.is_contiguous():
            dense, channels_last = gradient.contiguous(), False
        context = (gradient.dtype, channels_last)
        if self._half_wire:
            return half_part(dense, self._size), context
        if gradient.dtype == torch.bfloat16:  # which Horovod cannot reduce
            return dense.float() * (1.0 / self._size), context
        return dense.mul_(1.0 / self._size), context

    def decompress(self, reduced: Tensor, context: tuple[torch.dtype, bool]) -> Tensor:
        dtype, channels_last = context
        gradient = reduced.to(dtype)
        return gradient.permute(0, 3, 1, 2) if channels_last else gradient

"""The backend over Horovod: NCCL on GPUs, MPI or Gloo on CPUs. Only this file and horovod_rendezvous.py import horovod."""

import atexit
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# hvd.init() reads this: Horovod then never fuses two groups of gradients, so that the order of a sum does not depend on which
# gradient was ready first (see ReducerOptions.deterministic).
os.environ.setdefault("HOROVOD_DISABLE_GROUP_FUSION", "1")

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from distributed.addresses import check_own_name, set_interfaces
from distributed.topology import Topology, TopologyError, choose_controller
from runtime.exit_codes import EXIT_CONFIG

from .base import Group, Reducer, ReducerOptions
from .fp16_compression import fp16_share
from .horovod_rendezvous import prepare_gloo
from .objects import broadcast_json, decode, encode

# An installation without the compiled extension imports, but has no functions.
if not hasattr(hvd, "init"):
    raise ImportError("its extension for torch was not built")

# Gradients in one fixed group of the deterministic mode: Horovod's default fusion threshold.
_GROUP_BYTES = 64 << 20


class HorovodBackend:
    """Runs collectives over Horovod; see `distributed.backends.base.Backend`."""

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
        stop_rendezvous = _prepare_start(topology, device, timeout_s, controller)
        whole_world = tuple(range(topology.size))
        self._process_sets = {
            ranks: hvd.ProcessSet(list(ranks)) for ranks in map(tuple, rank_groups) if ranks != whole_world
        }
        try:
            hvd.init(process_sets=list(self._process_sets.values()))
        except ValueError as error:
            # Startup failed; Horovod's atexit hook would block on the ranks that did start.
            atexit.register(os._exit, EXIT_CONFIG)
            raise TopologyError(
                f"Horovod did not start on {topology.size} processes of {topology.launcher}; its own message is above. "
                "If a rank is invalid, Horovod was built without support for this launcher. Fix: make horovod, with MPI "
                "installed for mpirun. If process sets mismatch, the ranks have different batch-norm groups. "
                "Fix: one configuration for all ranks"
            ) from error
        # Until all ranks are here, some may still read the store.
        hvd.barrier()
        stop_rendezvous()
        self._process_sets[whole_world] = hvd.global_process_set
        if (hvd.rank(), hvd.size()) != (topology.rank, topology.size):
            raise TopologyError(
                f"{topology.launcher} set rank {topology.rank} of {topology.size}, but Horovod has rank {hvd.rank()} of "
                f"{hvd.size()}: it was built without support for this launcher. Fix: make horovod, with MPI installed for mpirun"
            )
        if hvd.mpi_enabled():
            _check_placement(topology)

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
        return broadcast_json(self, value)

    def all_gather_objects(self, value: Any) -> list[Any]:
        # Horovod's thread resizes the outputs, which torch forbids for tensors made in inference mode.
        with torch.inference_mode(False):
            text = encode(value)
            lengths = hvd.allgather(torch.tensor([len(text)]), name="objects.lengths")
            texts = hvd.allgather(text, name="objects.texts")
        return [decode(each) for each in texts.split(lengths.tolist())]

    def group(self, rank_groups: Sequence[Sequence[int]]) -> Group | None:
        unknown = [ranks for ranks in map(tuple, rank_groups) if ranks not in self._process_sets]
        if unknown:
            raise ValueError(
                f"Horovod's groups are fixed when it starts, and {unknown[0]} is not one. Fix: make_backend(rank_groups=)"
            )
        mine = next((ranks for ranks in map(tuple, rank_groups) if self.topology.rank in ranks), None)
        return None if mine is None else Group(mine, self._process_sets[mine])

    def reducer(self, network: nn.Module, options: ReducerOptions) -> Reducer:
        return _HorovodReducer(network, options)

    def close(self) -> None:
        # Under MPI the other ranks fail if one leaves while they still reduce.
        hvd.barrier()
        hvd.shutdown()


def _prepare_start(topology: Topology, device: torch.device, timeout_s: float, controller: str) -> Callable[[], None]:
    """Set the environment that hvd.init() reads; returns the function that stops what only the start needs."""
    chosen = choose_controller(controller, topology)
    if chosen is not None:
        # Under srun both work, and Horovod takes MPI wherever it was built with it.
        os.environ["HOROVOD_CONTROLLER"] = os.environ["HOROVOD_CPU_OPERATIONS"] = chosen
    # The default is 30 s: a busy node may need longer, and so does the monitor, to name a rank that hangs.
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(round(timeout_s)))
    # Dynamic process sets synchronize all ranks every cycle. If one rank is stuck, another rank's enqueue blocks on Horovod's
    # mutex while holding the GIL, which also silences its control thread.
    os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "0"
    if device.type == "cuda":
        # The host returns as soon as a reduction is queued, and torch's stream waits for it on the GPU. Without this the host
        # waits for each reduction, and cannot queue work ahead. Horovod waits on the default stream, the only one we use.
        os.environ.setdefault("HOROVOD_ENABLE_ASYNC_COMPLETION", "1")
    # MPI chooses its own interfaces.
    if chosen == "gloo" or topology.launcher == "horovodrun":
        check_own_name(topology)
        set_interfaces(topology)
    return prepare_gloo(topology, timeout_s) if chosen == "gloo" else lambda: None


def _check_placement(topology: Topology) -> None:
    """Raise TopologyError if the launcher's local ranks differ from MPI's: two processes would use one GPU.

    Needs mpi4py, which joins the MPI that Horovod has started.
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
    """A Reducer on Horovod's DistributedOptimizer, whose hooks overlap the reduction with backward.

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
            compression=GradientCompressor(hvd.size(), options.fp16_compression),
            backward_passes_per_step=options.accumulation,
            op=hvd.Sum,
            groups=-(-num_bytes // _GROUP_BYTES) if options.deterministic else None,
        )

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        # Horovod's hooks count micro-steps.
        yield

    def finish(self) -> None:
        if hvd.size() == 1:
            return
        for handle, _ in list(self._hooks._handles.values()):
            if handle is not None:
                _wait(handle)
        self._hooks.synchronize()


def _wait(handle: int) -> None:
    """Sleep until an operation is done.

    Horovod's synchronize() spins, which takes a core from the threads that reduce: on 2 cores a step of two processes took
    1.3 to 1.8 times as long as DDP's, and with this wait about as long (benchmarks/step.py).
    """
    pause_s = 20e-6
    while not hvd.poll(handle):
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 500e-6)


class GradientCompressor:
    """Converts a gradient into a tensor that Horovod can send, and back: contiguous, fp32 (or fp64) or fp16, divided by the
    world size.

    Divides before the sum (see `fp16_share`), and here, because Horovod's grouped reduction ignores its prescale_factor.
    """

    def __init__(self, world_size: int, fp16: bool) -> None:
        self._world_size = world_size
        self._fp16 = fp16

    def compress(self, gradient: Tensor) -> tuple[Tensor, tuple[torch.dtype, bool]]:
        channels_last = gradient.dim() == 4 and not gradient.is_contiguous()
        dense = gradient.permute(0, 2, 3, 1) if channels_last else gradient
        if not dense.is_contiguous():
            dense, channels_last = gradient.contiguous(), False
        context = (gradient.dtype, channels_last)
        if self._fp16:
            return fp16_share(dense, self._world_size), context
        # Horovod cannot reduce bfloat16.
        if gradient.dtype == torch.bfloat16:
            return dense.float() * (1.0 / self._world_size), context
        return dense.mul_(1.0 / self._world_size), context

    def decompress(self, reduced: Tensor, context: tuple[torch.dtype, bool]) -> Tensor:
        dtype, channels_last = context
        gradient = reduced.to(dtype)
        return gradient.permute(0, 3, 1, 2) if channels_last else gradient

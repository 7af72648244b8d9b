"""Compare predicted steps with steps on emulated nodes, for benchmarks/simulator.py --emulated.

Each node is a namespace whose link has a rate limit. The network's layers have real gradients, which DDP or Horovod reduces over
Gloo. They sleep, so that compute needs no core, or multiply matrices, so that all nodes share the machine's cores. A table of
all-reduces is measured on two nodes, and steps are predicted for 2, 4 and 8 from this table and from the compute time without a
reduction. Nothing is fitted to steps.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

import torch
from torch import Tensor, nn

from benchmarks.emulated_nodes import emulated_nodes, run_on_nodes, set_rate
from distributed.backends.base import Backend, ReducerOptions
from distributed.backends.make import make_backend
from distributed.topology import find_topology
from training.calibration import measure
from training.planning.simulator.all_reduce import table_s
from training.planning.simulator.figures import Table
from training.planning.simulator.overlap import (
    BACKWARD_SHARE,
    Gradient,
    ddp_messages,
    exposed_s,
    horovod_messages,
    ready_times,
)

# Low, because all nodes share the cores of one machine, which TCP needs too.
RATES_MBIT = (25, 50, 100)
WORLDS = (2, 4, 8)
# From the first layer to the last, about as ResNet's stages grow: 3.1 MiB in all.
LAYER_BYTES = tuple(2**10 * kib for kib in (64, 64, 128, 128, 256, 512, 1024, 1024))
COMPUTE = ("sleeping", "real")
# A layer takes one unit forward and two backward.
_UNIT_S = 0.02
_UNIT_PRODUCTS = 20
_STEPS = 4
_TABLE_S = 12.0
_LIMIT_S = 600.0


def steps_on_nodes(backend: str, world: int, compute: str) -> dict[str, Any]:
    """Return what rank 0 measured on emulated nodes, by rate: the steps, and on two nodes the table."""
    with emulated_nodes(world) as names, tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        run_on_nodes(names, [__file__, backend, compute, str(result)], Path(folder), _LIMIT_S)
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def emulated(compute: str, worlds: tuple[int, ...] = WORLDS) -> list[dict[str, Any]]:
    """Measure and predict every cell. The first of `worlds` gives the tables."""
    rows = []
    for backend in ("torch", "horovod"):
        tables: dict[str, Table] = {}
        for world in worlds:
            for rate, found in steps_on_nodes(backend, world, compute).items():
                if "table" in found:
                    table = found["table"]
                    sizes = tuple(float(size) for size in table)
                    tables[rate] = Table(world, "ring", sizes, tuple(table.values()))
                predicted_s = predicted_step_s(backend, world, tables[rate], found["compute_s"])
                rows.append({
                    "compute": compute, "backend": backend, "nodes": world, "mbit_per_s": int(rate),
                    "compute_ms": 1000 * found["compute_s"],
                    "measured_ms": 1000 * found["step_s"], "predicted_ms": 1000 * predicted_s,
                    "error_percent": 100 * (predicted_s / found["step_s"] - 1),
                })  # fmt: skip
                print(
                    f"{compute}: {backend} on {world} nodes, {rate} Mbit/s: {rows[-1]['error_percent']:+.1f}%",
                    flush=True,
                )
    return rows


def predicted_step_s(backend: str, world: int, table: Table, compute_s: float) -> float:
    gradients = [Gradient(num_bytes, 1) for num_bytes in reversed(LAYER_BYTES)]
    backward_s = BACKWARD_SHARE * compute_s
    ready = ready_times(gradients, backward_s)
    messages = horovod_messages(gradients, ready) if backend == "horovod" else ddp_messages(gradients, ready)

    def reduce_s(num_bytes: float) -> float:
        return table_s(table, num_bytes, world)

    # As in training.planning.simulator.step.
    negotiation_s = reduce_s(64) if backend == "horovod" else 0.0
    return compute_s + exposed_s(messages, backward_s, reduce_s, negotiation_s)


def _compute(units: int, real: bool) -> None:
    if not real:
        time.sleep(units * _UNIT_S)
        return
    x = torch.ones(192, 192)
    for _ in range(units * _UNIT_PRODUCTS):
        torch.mm(x, x)


class _Layer(torch.autograd.Function):
    """Takes its time forward and backward."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, real: bool) -> Tensor:
        _compute(1, real)
        context.real = real
        context.save_for_backward(weight)
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        _compute(2, context.real)
        (weight,) = context.saved_tensors
        return gradients[0], torch.ones_like(weight), None


class _LayerModule(nn.Module):
    def __init__(self, num_bytes: int, real: bool) -> None:
        super().__init__()
        self._real = real
        self.weight = nn.Parameter(torch.zeros(num_bytes // 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Layer.apply(x, self.weight, self._real)  # type: ignore[no-untyped-call]
        return y


def _rank(backend_name: str, real: bool, result: Path) -> None:
    """Measure on one node; rank 0 writes the result."""
    backend = make_backend(backend_name, find_topology(), torch.device("cpu"), _LIMIT_S, "gloo")
    measure.MESSAGES_S = _TABLE_S
    network = nn.Sequential(*(_LayerModule(num_bytes, real) for num_bytes in LAYER_BYTES))
    reducer = backend.reducer(network, ReducerOptions())
    found = {}
    for rate in RATES_MBIT:
        set_rate(rate)
        backend.all_gather_objects(None)
        of_rate: dict[str, Any] = {"table": measure.measure_messages(backend)} if backend.topology.size == 2 else {}
        steps_s = [_step_s(backend, network, reducer) for _ in range(2 + _STEPS)][2:]
        # On all nodes at once.
        backend.all_gather_objects(None)
        computed_s = [_compute_s(real) for _ in range(_STEPS)]
        slowest = [max(of_ranks) for of_ranks in zip(*backend.all_gather_objects(computed_s), strict=True)]
        found[str(rate)] = of_rate | {"step_s": median(steps_s), "compute_s": median(slowest)}
    if backend.topology.rank == 0:
        result.write_text(json.dumps(found))
    backend.all_gather_objects(None)
    backend.close()


def _step_s(backend: Backend, network: nn.Module, reducer: Any) -> float:
    backend.all_gather_objects(None)
    start = time.perf_counter()
    with reducer.micro_step(True):
        reducer.network(torch.ones(1, requires_grad=True)).sum().backward()
    reducer.finish()
    # The slowest rank's.
    took_s: float = max(backend.all_gather_objects(time.perf_counter() - start))
    for parameter in network.parameters():
        parameter.grad = None
    return took_s


def _compute_s(real: bool) -> float:
    """Take a step without a reduction."""
    x = torch.ones(1, requires_grad=True)
    weights = [torch.zeros(num_bytes // 4, requires_grad=True) for num_bytes in LAYER_BYTES]
    start = time.perf_counter()
    for weight in weights:
        x = _Layer.apply(x, weight, real)  # type: ignore[no-untyped-call]
    x.sum().backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    _rank(sys.argv[1], sys.argv[2] == "real", Path(sys.argv[3]))

"""Measure the cost of synchronized batch norm over two processes in a training step, against batch norm within each process.

python benchmarks/batch_norm.py                          both networks, both backends
python benchmarks/batch_norm.py --only horovod           one backend
python benchmarks/batch_norm.py --channels-last --quick  a minute, for a first impression

Both steps are a forward and backward pass, the gradient all-reduce and the fused SGD. `distributed.batch_norm` converts all
layers: to groups within a process, which use nn.BatchNorm2d's own kernel, or to one group over both processes. The two alternate
in the same processes. torch's SyncBatchNorm is not measured: it rejects CPU tensors, and the output quotes its error.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

import torch
from torch import Tensor, nn

from benchmarks import common
from distributed.backends.base import Backend, Group, ReducerOptions
from distributed.backends.make import make_backend
from distributed.batch_norm.layer import convert_batch_norm
from distributed.topology import find_topology
from tsm.networks import build_network

NUM_CLASSES = 10
PROCESSES = 2
BACKENDS = ("torch", "horovod")
NETWORKS = ("resnet18", "resnet50")
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Setting:
    """Sizes of the measurement: `blocks` pairs of blocks of `block_steps` steps.

    `batch` clips per step over both processes, each with `frames` frames of `size` x `size` pixels.
    """

    batch: int
    size: int
    frames: int
    blocks: int
    block_steps: int
    threads: int
    channels_last: bool


# ----------------------------------------------------------------------------------------------- in the measured processes


class Meter:
    """A backend whose all-reduce counts messages, bytes and the seconds spent in it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.messages, self.bytes, self.waited_s = 0, 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def all_reduce_(self, x: Tensor, name: str, group: Group | None = None) -> None:
        started_s = time.perf_counter()
        self._backend.all_reduce_(x, name, group)
        self.waited_s += time.perf_counter() - started_s
        self.messages += 1
        self.bytes += x.numel() * x.element_size()


def make_step(name: str, setting: Setting, backend: Backend, meter: Meter | None) -> Callable[[], None]:
    """Return a training step on one batch in memory; with `meter`, batch norm spans both processes and reduces through it."""
    torch.manual_seed(0)
    network = build_network(name, NUM_CLASSES, setting.frames)
    groups = [list(range(backend.topology.size))] if meter else []
    convert_batch_norm(network, meter or backend, 1, groups, 1)  # type: ignore[arg-type]
    clips, shape = setting.batch // PROCESSES, (setting.frames, 3, setting.size, setting.size)
    video_NTCHW, label_N = torch.randn(clips, *shape), torch.arange(clips) % NUM_CLASSES
    if setting.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        frames_BCHW = video_NTCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        video_NTCHW = frames_BCHW.unflatten(0, video_NTCHW.shape[:2])
    reducer = backend.reducer(network.train(), ReducerOptions())
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with reducer.micro_step(last=True):
            nn.functional.cross_entropy(reducer.network(video_NTCHW), label_N).backward()
        reducer.finish()
        optimizer.step()

    return step


def compare(name: str, setting: Setting, backend: Backend) -> dict[str, Any]:
    """Alternate blocks of local and joined batch norm; return the times per step, and the meter's counts per step."""
    meter = Meter(backend)
    steps = {"local": make_step(name, setting, backend, None), "joined": make_step(name, setting, backend, meter)}
    for step in steps.values():
        for _ in range(WARM_UP_STEPS):
            step()
    measured: dict[str, Any] = {"local": [], "joined": [], "waited_s": []}
    taken = setting.blocks * setting.block_steps
    messages, num_bytes = meter.messages, meter.bytes
    for block in range(setting.blocks):
        for kind in ("local", "joined") if block % 2 == 0 else ("joined", "local"):
            start, waited_s = common.Clock.now(), meter.waited_s
            for _ in range(setting.block_steps):
                steps[kind]()
            measured[kind].append(asdict(common.Clock.now().since(start, setting.block_steps)))
            if kind == "joined":
                measured["waited_s"].append((meter.waited_s - waited_s) / setting.block_steps)
    measured["messages"] = (meter.messages - messages) / taken
    measured["bytes"] = (meter.bytes - num_bytes) / taken
    return measured


def torch_says(backend: Backend) -> str:
    """Try torch's SyncBatchNorm on CPU tensors of two processes and return its error."""
    if backend.name != "torch":
        return "needs a process group of torch's"
    try:
        nn.SyncBatchNorm(3)(torch.randn(4, 3, 2, 2))
    except ValueError as error:
        return str(error)
    return "runs"


def work(name: str, setting: Setting, folder: Path) -> None:
    """Measure on one rank; rank 0 writes its measurements to `folder`."""
    torch.set_num_threads(setting.threads)
    topology = find_topology()
    backend = make_backend(name, topology, torch.device("cpu"), timeout_s=120.0)
    measured = {network: compare(network, setting, backend) for network in NETWORKS}
    if topology.rank == 0:
        (folder / "measured.json").write_text(json.dumps({"torch_says": torch_says(backend), **measured}))
    else:
        torch_says(backend)
    backend.close()


# ------------------------------------------------------------------------------------------------- in the benchmark itself


def measure(backend: str, setting: Setting) -> tuple[list[dict[str, Any]], str]:
    """Start the processes of a backend; return a row per network and the result of torch's SyncBatchNorm."""
    with tempfile.TemporaryDirectory() as folder:
        order = json.dumps([backend, asdict(setting), folder, os.getpid()])
        environ = {"OMP_NUM_THREADS": str(setting.threads)}
        common.run_child(
            [*common.launch_command(backend, PROCESSES, __file__), "--worker", order], Path(folder) / "log", environ
        )
        measured = json.loads((Path(folder) / "measured.json").read_text())
    said = measured.pop("torch_says")
    return [row_of(backend, network, setting, found) for network, found in measured.items()], said


def row_of(backend: str, network: str, setting: Setting, found: dict[str, Any]) -> dict[str, Any]:
    local, joined = ([common.Clock(**sample) for sample in found[kind]] for kind in ("local", "joined"))
    return {
        "benchmark": "batch_norm",
        "backend": backend,
        "network": network,
        "processes": PROCESSES,
        **asdict(setting),
        "local_s": common.median_interval([clock.wall_s for clock in local]),
        "joined_s": common.median_interval([clock.wall_s for clock in joined]),
        "ratio": common.ratio_interval([clock.wall_s for clock in joined], [clock.wall_s for clock in local]),
        "cpu_ratio": common.ratio_interval([clock.cpu_s for clock in joined], [clock.cpu_s for clock in local]),
        "in_messages_s": common.median_interval(found["waited_s"]),
        "messages": found["messages"],
        "bytes": found["bytes"],
    }


def show(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['network']}, {row['backend']}",
        row["local_s"].show(1000, 0),
        row["joined_s"].show(1000, 0),
        row["ratio"].show(digits=3),
        row["cpu_ratio"].show(digits=3),
        row["in_messages_s"].show(1000, 0),
        f"{row['messages']:.0f}",
        f"{row['bytes'] / 1000:.0f}",
    ]


TITLES = (
    "network",
    "local [ms/step]",
    "joined [ms/step]",
    "ratio",
    "ratio of CPU time",
    "in messages [ms/step]",
    "messages",
    "kB",
)


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser("The cost of batch norm over two processes in a step of training.")
    parser.add_argument("--only", choices=BACKENDS, help="one of the backends")
    parser.add_argument("--batch", type=int, default=8, help="clips of a step, over both processes")
    parser.add_argument("--size", type=int, default=56, help="side of a frame in pixels")
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip")
    parser.add_argument("--blocks", type=int, default=20, help="pairs of blocks")
    parser.add_argument("--block-steps", type=int, default=1, help="steps of a block")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--channels-last", action="store_true", help="memory layout of frames and weights")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.worker:
        backend, plain, folder, parent = json.loads(options.worker)
        common.end_with(parent)
        work(backend, Setting(**plain), Path(folder))
        return 0
    if options.quick:
        options.batch, options.blocks = 4, 6
    names = ("batch", "size", "frames", "blocks", "block_steps", "threads", "channels_last")
    setting = Setting(**{name: getattr(options, name) for name in names})
    facts = common.machine_facts(setting.threads)
    rows, failures = [], 0
    for backend in BACKENDS:
        if options.only not in (None, backend):
            continue
        print(f"measuring {backend}, {PROCESSES} processes ...", flush=True)
        try:
            found, said = measure(backend, setting)
        except FileNotFoundError as error:
            print(f"left out, {error.filename} is not there. Fix: make horovod", file=sys.stderr, flush=True)
            continue
        except common.ChildFailed as error:
            print(error, file=sys.stderr, flush=True)
            failures += 1
            continue
        rows += found
        print(f"torch's SyncBatchNorm there: {said}", flush=True)
    layout = "channels_last" if setting.channels_last else "contiguous"
    print(
        f"\n{setting.batch} clips a step x {setting.frames} frames x {setting.size} px, {layout}; "
        f"{setting.blocks} pairs of blocks of {setting.block_steps} steps"
        f"\n{facts['cpu']}, {facts['cores']} cores, load {facts['load']}; torch {facts['torch']}, "
        f"{setting.threads} thread(s) a process; {facts['date']}"
        "\nmedian [its 95% interval]; ratios within each pair of blocks; `in messages` holds the wait for the other process\n"
    )
    if rows:
        common.print_table(TITLES, [show(row) for row in rows])
    if options.json:
        common.write_rows(options.json, rows, facts)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

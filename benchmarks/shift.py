"""Measure the cost of the temporal shift in a network: against no shift, a naive shift, and a plain copy as lower bound.

python benchmarks/shift.py                           ResNet-50, both memory layouts, training and inference, peak memory
python benchmarks/shift.py --only training
python benchmarks/shift.py --quick --json FILE       a minute, for a first impression

One network alternates between these functions in place of `temporal_shift`:

- none: returns the input, which makes the network a TSN;
- naive: zeros and three slice assignments, differentiated by autograd (the usual way to write a shift);
- copy: copies the input, and its gradient. The identity path needs the unchanged input, so every shift writes its output at
  least once, and its gradient too. This is the lower bound of any separate shift operation; a faster shift must be fused into
  the convolution after it;
- ours: `tsm.shift.temporal_shift`;
- slices (on CUDA): ours without its Triton kernel, one copy per slice of channels.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

import torch
from torch import Tensor, nn

from benchmarks import common
from tsm import networks
from tsm.networks import TemporalNetwork, build_network
from tsm.shift import OFFSETS, Direction, shift_by_slices, temporal_shift

NUM_CLASSES = 400
# Ratio of a training step to that of the network without a shift.
TARGET = 1.10
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("training", "inference")

ShiftFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """Sizes of the measurement: `clips` clips per step, of `frames` frames of `size` pixels; `rounds` turns per function."""

    backbone: str
    clips: int
    frames: int
    size: int
    rounds: int
    threads: int
    device: str


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NTCHW: Tensor) -> Tensor:
        return x_NTCHW.clone()

    @staticmethod
    def backward(ctx: Any, grad_NTCHW: Tensor) -> Tensor:  # type: ignore[override]
        return grad_NTCHW.clone()


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NTCHW: Tensor, fold: int, offsets: tuple[int, ...]) -> Tensor:
        ctx.fold, ctx.offsets = fold, offsets
        return shift_by_slices(x_NTCHW, fold, offsets)

    @staticmethod
    def backward(ctx: Any, grad_NTCHW: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return shift_by_slices(grad_NTCHW, ctx.fold, tuple(-offset for offset in ctx.offsets)), None, None


def sliced_shift(x_NTCHW: Tensor, fold_div: int = 8, direction: Direction = "both") -> Tensor:
    shifted: Tensor = _Slices.apply(x_NTCHW, x_NTCHW.shape[2] // fold_div, OFFSETS[direction])
    return shifted


def naive_shift(x_NTCHW: Tensor, fold_div: int = 8, direction: str = "both") -> Tensor:
    fold = x_NTCHW.shape[2] // fold_div
    out_NTCHW = torch.zeros_like(x_NTCHW)
    out_NTCHW[:, :-1, :fold] = x_NTCHW[:, 1:, :fold]
    out_NTCHW[:, 1:, fold : 2 * fold] = x_NTCHW[:, :-1, fold : 2 * fold]
    out_NTCHW[:, :, 2 * fold :] = x_NTCHW[:, :, 2 * fold :]
    return out_NTCHW


FUNCTIONS: dict[str, ShiftFunction] = {
    "none": lambda x_NTCHW, *_: x_NTCHW,
    "naive": naive_shift,
    "copy": lambda x_NTCHW, *_: _Copy.apply(x_NTCHW),
    "ours": temporal_shift,
    "slices": sliced_shift,
}


def names_of(device: str) -> list[str]:
    """Return the functions to measure on `device`; on a CPU, ours is the same as slices."""
    return [name for name in FUNCTIONS if device == "cuda" or name != "slices"]


class Bench:
    """A network and a batch; `run` times a training step or a forward pass with one of the functions as the shift."""

    def __init__(self, setting: Setting, layout: str, training: bool) -> None:
        torch.manual_seed(0)
        self._device = torch.device(setting.device)
        self._training = training
        self._network: TemporalNetwork = build_network(setting.backbone, NUM_CLASSES, setting.frames)
        self._network.to(self._device, memory_format=LAYOUTS[layout]).train(training)  # type: ignore[call-overload]
        self._optimizer = torch.optim.SGD(self._network.parameters(), lr=1e-3, momentum=0.9, fused=True)
        frames_BCHW = torch.randn(setting.clips * setting.frames, 3, setting.size, setting.size, device=self._device)
        frames_BCHW = frames_BCHW.contiguous(memory_format=LAYOUTS[layout])
        self._video_NTCHW = frames_BCHW.unflatten(0, (setting.clips, setting.frames))
        self._label_N = torch.randint(0, NUM_CLASSES, (setting.clips,), device=self._device)

    def run(self, function: str) -> common.Clock:
        """Return the time of one turn; any function may run next on the network."""
        networks.temporal_shift = FUNCTIONS[function]
        start = common.Clock.now(self._device.type)
        if self._training:
            self._optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(self._network(self._video_NTCHW), self._label_N).backward()
            self._optimizer.step()
        else:
            with torch.inference_mode():
                self._network(self._video_NTCHW)
        return common.Clock.now(self._device.type).since(start, 1)


def take_turns(setting: Setting, layout: str, mode: str) -> dict[str, list[common.Clock]]:
    """Return the times of each function, one per round; the order rotates, so that each function starts some rounds."""
    bench = Bench(setting, layout, training=mode == "training")
    names = names_of(setting.device)
    for name in names:
        bench.run(name)
    clocks: dict[str, list[common.Clock]] = {name: [] for name in names}
    for round_number in range(setting.rounds):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            clocks[name].append(bench.run(name))
    return clocks


def peak_mib(setting: Setting, layout: str, mode: str, function: str) -> float:
    """Return the peak memory in MiB that two turns add to the network and its batch, measured in a separate process."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "peak.json"
        order = json.dumps([asdict(setting), layout, mode, function, str(out), os.getpid()])
        common.run_child([sys.executable, __file__, "--worker", order], Path(name) / "log", {})
        measured: float = json.loads(out.read_text())
    return measured


def measure_peak(setting: Setting, layout: str, mode: str, function: str) -> float:
    bench = Bench(setting, layout, training=mode == "training")
    if setting.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        # Reset the peak. ru_maxrss would still include the parent's.
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_rss_bytes()
    for _ in range(2):
        bench.run(function)
    if setting.device == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return (_peak_rss_bytes() - before) / 2**20


def _peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: peak memory is measured on Linux alone")


def measure(setting: Setting, layout: str, mode: str) -> list[dict[str, Any]]:
    clocks = take_turns(setting, layout, mode)
    base_s = [clock.wall_s for clock in clocks["none"]]
    base_cpu_s = [clock.cpu_s for clock in clocks["none"]]
    return [
        {
            "benchmark": "shift",
            "mode": mode,
            "layout": layout,
            "shift": name,
            **asdict(setting),
            "step_s": common.median_interval([clock.wall_s for clock in samples]),
            "ratio": common.ratio_interval([clock.wall_s for clock in samples], base_s),
            "cpu_ratio": common.ratio_interval([clock.cpu_s for clock in samples], base_cpu_s),
            "peak_mib": round(peak_mib(setting, layout, mode, name), 1),
        }
        for name, samples in clocks.items()
    ]


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser("The cost of the temporal shift in a network, beside its bound.")
    parser.add_argument("--only", choices=MODES, help="one of the two")
    parser.add_argument("--layout", choices=list(LAYOUTS), help="one of the two")
    parser.add_argument("--backbone", default="resnet50", help="of the network")
    parser.add_argument("--clips", type=int, default=2, help="clips of a step")
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip")
    parser.add_argument("--size", type=int, default=224, help="side of a frame in pixels")
    parser.add_argument("--rounds", type=int, default=16, help="turns of each function")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.worker:
        plain, layout, mode, function, out, parent = json.loads(options.worker)
        common.end_with(parent)
        setting = Setting(**plain)
        torch.set_num_threads(setting.threads)
        Path(out).write_text(json.dumps(measure_peak(setting, layout, mode, function)))
        return 0
    if options.quick:
        options.clips, options.size, options.rounds = 1, 64, 6
    names = ("backbone", "clips", "frames", "size", "rounds", "threads", "device")
    setting = Setting(**{name: getattr(options, name) for name in names})
    torch.set_num_threads(setting.threads)
    facts = common.machine_facts(setting.threads)
    rows: list[dict[str, Any]] = []
    for mode in MODES if options.only is None else (options.only,):
        for layout in LAYOUTS if options.layout is None else (options.layout,):
            print(f"measuring {mode}, {layout} ...", flush=True)
            rows += measure(setting, layout, mode)
    print_results(rows, setting, facts)
    if options.json:
        common.write_rows(options.json, rows, facts)
    return 0


def print_results(rows: list[dict[str, Any]], setting: Setting, facts: dict[str, Any]) -> None:
    print(
        f"\n{setting.backbone}, {setting.clips} clips a step x {setting.frames} frames x {setting.size} px; "
        f"{setting.rounds} rounds"
        f"\n{facts['cpu']}, {facts['cores']} cores, load {facts['load']}; torch {facts['torch']}, "
        f"{setting.threads} thread(s), {setting.device}; {facts['date']}"
        "\nmedian [its 95% interval]; ratios to no shift within each round; memory is what two steps add at their peak\n"
    )
    titles = ("what", "shift", "step [ms]", "ratio", "ratio of CPU time", "peak [MiB]")
    print_rows = [
        [
            f"{row['mode']}, {row['layout']}",
            row["shift"],
            row["step_s"].show(1000, 0),
            row["ratio"].show(digits=3),
            row["cpu_ratio"].show(digits=3),
            f"{row['peak_mib']:.0f}",
        ]
        for row in rows
    ]
    common.print_table(titles, print_rows)
    print(f"\ntarget of ours in training: a ratio of {TARGET} or less")


if __name__ == "__main__":
    sys.exit(main())

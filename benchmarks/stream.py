"""Measure a frame of a live stream on this machine's CPU: runtimes, float32 and int8, against what a stream replaces.

python benchmarks/stream.py                               MobileNetV2, 224 px, 1 and 2 threads, every runtime that is installed
python benchmarks/stream.py --backbone resnet50 --runtimes onnx openvino
python benchmarks/stream.py --quick --json FILE           a first impression

Files are made by the code of export.py, from random weights. Four networks run in each runtime, a batch of 1:

- stream: past-only TSM, one frame per call, caches carried from call to call;
- plain: the same network without a shift, and so without caches: the difference is the cost of the shift;
- window: offline TSM on a clip of 8 frames, which an application without caches runs again for each new frame;
- TSN: the window without a shift.

Runtimes: eager PyTorch (channels_last), ONNX Runtime, OpenVINO in float32 arithmetic, LiteRT on XNNPACK; torch.compile with
freezing and ExecuTorch on XNNPACK run stream and plain only. All with the same number of threads alternate in short turns of
frames. Each turn begins with a pause, in which the threads of the previous one stop spinning. Ratios are those of medians within a
round. Before they are measured, float32 files must compute what PyTorch computes.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import argparse
import functools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

import torch

from benchmarks import common
from benchmarks.stream_runtimes import RUNTIMES, calibration_calls, calls_without_end, networks
from training.deploy.export.check import FP32_LIMIT, ExportError, Run, logits_over, random_video
from training.deploy.export.formats import FORMATS
from training.deploy.export.forms import Exportable, Files
from training.deploy.export.openvino import openvino_from_onnx

PUBLISHED = [
    {
        "published": "arXiv:1811.08383, arXiv:2109.13227 (abstracts)",
        "network": "online TSM",
        "device": "Jetson Nano",
        "ms": 13,
        "fps": 74,
    },
    {
        "published": "arXiv:1811.08383, arXiv:2109.13227 (abstracts)",
        "network": "online TSM",
        "device": "Galaxy Note8",
        "ms": 35,
        "fps": 29,
    },
]
"""Other people's figures on devices that are not here. They are no targets: the hardware is another."""
# Thread pools spin for some milliseconds after a call.
_PAUSE_S = 0.02
# Frames of a turn that are measured; a window takes as long as several.
_FRAMES, _WINDOWS = 8, 1
_CHECKED_FRAMES = 8


class Key(NamedTuple):
    """What a row measures."""

    runtime: str
    precision: str
    network: str


class Candidate:
    """One network in one runtime; keeps its caches between turns."""

    def __init__(self, network: Exportable, run: Run, layout: torch.memory_format) -> None:
        self._run = run
        self._inputs = calls_without_end(network, layout)
        self._calls = _WINDOWS if network.form == "clip" else _FRAMES
        self._caches = network.zeros(1)[1:]

    def turn(self) -> list[common.Clock]:
        """Return the time of each call of a turn, after one call that is not measured: its caches were evicted."""
        time.sleep(_PAUSE_S)
        self._call()
        return [self._call() for _ in range(self._calls)]

    def _call(self) -> common.Clock:
        frame = next(self._inputs)
        start = common.Clock.now()
        _, *self._caches = self._run([frame, *self._caches])
        return common.Clock.now().since(start, 1)


def make_files(kinds: Sequence[Key], exported: dict[str, Exportable]) -> dict[Key, Files]:
    """Export each network once for each format and precision; runtimes without files get none."""

    @functools.cache
    def files_of(format_name: str, precision: str, name: str) -> Files:
        if format_name == "openvino":
            # As its Format does, but each ONNX file is made once.
            return openvino_from_onnx(files_of("onnx", precision, name))
        print(f"exporting {name}: {format_name}, {precision} ...", flush=True)
        found, network = FORMATS[format_name], exported[name]
        if precision == "fp32":
            return found.make(network)
        assert found.quantize is not None
        return found.quantize(files_of(format_name, "fp32", name), network, calibration_calls(network))

    formats = {key: RUNTIMES[key.runtime].format for key in kinds}
    return {key: files_of(name, key.precision, key.network) if name else {} for key, name in formats.items()}


def open_candidates(
    files: dict[Key, Files], exported: dict[str, Exportable], threads: int
) -> tuple[dict[Key, Candidate], dict[Key, str]]:
    """Open everything with this number of threads. Returns what runs, and why the rest does not.

    Raises ExportError if a float32 file computes something else than PyTorch.
    """
    found, failed = {}, {}
    for key, content in files.items():
        network, runtime = exported[key.network], RUNTIMES[key.runtime]
        try:
            run = runtime.open(content, network, threads)
            candidate = Candidate(network, run, runtime.layout)
            # Compiles, allocates.
            candidate.turn()
        # Each runtime has errors of its own.
        except Exception as error:
            # The longest name a dozen source files.
            failed[key] = f"it does not run: {' '.join(str(error).split())[:300]}"
            continue
        if key.precision == "fp32" and not (difference := difference_of(network, run)) <= FP32_LIMIT:
            raise ExportError(f"{' '.join(key)} differs from PyTorch by {difference:.1e} of the largest logit")
        found[key] = candidate
    return found, failed


def difference_of(network: Exportable, run: Run) -> float:
    """Return the largest difference of a logit from PyTorch's over 8 frames, relative to the largest logit."""
    frames = max(_CHECKED_FRAMES, network.num_frames)
    video_NTCHW = random_video(1, frames - frames % network.num_frames, network.size, seed=3)
    expected, got = (logits_over(network, each, video_NTCHW) for each in (network.run, run))
    return float((expected - got).abs().max() / expected.abs().max())


def take_turns(candidates: dict[Key, Candidate], rounds: int) -> dict[Key, list[list[common.Clock]]]:
    """Return the time of each call, by round. The order rotates."""
    keys = list(candidates)
    clocks: dict[Key, list[list[common.Clock]]] = {key: [] for key in keys}
    for number in range(rounds):
        first = number % len(keys)
        for key in keys[first:] + keys[:first]:
            clocks[key].append(candidates[key].turn())
    return clocks


def rows_of(clocks: dict[Key, list[list[common.Clock]]], setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each candidate. `relative_to_NAME`: its time over that of NAME, in the same runtime and precision."""
    wall_s = {key: [median(call.wall_s for call in turn) for turn in turns] for key, turns in clocks.items()}
    cpu_s = {key: [median(call.cpu_s for call in turn) for turn in turns] for key, turns in clocks.items()}

    def ratios(key: Key, seconds: dict[Key, list[float]], prefix: str) -> dict[str, common.Interval | None]:
        eager = Key("eager", "fp32", key.network)
        pairs = {"times_as_fast_as_eager": (eager, key)} | {
            f"relative_to_{name}": (key, key._replace(network=name)) for name in ("stream", "plain", "TSN")
        }
        return {
            prefix + name: common.ratio_interval(seconds[above], seconds[below])
            if above != below and above in seconds and below in seconds
            else None
            for name, (above, below) in pairs.items()
        }

    return [
        {
            "benchmark": "stream",
            **setting,
            **key._asdict(),
            "call_s": common.median_interval(wall_s[key]),
            "p95_s": quantiles([call.wall_s for turn in turns for call in turn], n=20)[-1],
            "cpu_s": common.median_interval(cpu_s[key]),
            **ratios(key, wall_s, ""),
            **ratios(key, cpu_s, "cpu_"),
        }
        for key, turns in clocks.items()
    ]


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser("A frame of a live stream in each runtime.")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=224, help="side of a frame in pixels")
    parser.add_argument("--window", type=int, default=8, help="frames of a window")
    parser.add_argument("--rounds", type=int, default=16, help="turns of each")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads, one after another")
    parser.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES))
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.quick:
        options.size, options.rounds = 64, 6
    missing = {name: reason for name in options.runtimes if (reason := RUNTIMES[name].missing)}
    not_measured = dict(missing)
    kinds = [
        Key(name, precision, network)
        for name in options.runtimes
        if name not in missing
        for precision in RUNTIMES[name].precisions
        for network in ("stream", "plain", "window", "TSN")
        if not RUNTIMES[name].streams_only or network in ("stream", "plain")
    ]
    facts = common.machine_facts(threads=0)
    # Each row has its own.
    del facts["threads"]
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        exported = networks(options.backbone, options.size, options.window)
        files = make_files(kinds, exported)
        for threads in options.threads:
            setting = {"backbone": options.backbone, "size": options.size, "threads": threads}
            candidates, failed = open_candidates(files, exported, threads)
            not_measured |= {" ".join(key): reason for key, reason in failed.items()}
            print(f"measuring with {threads} thread(s), load {os.getloadavg()[0]:.1f} ...", flush=True)
            rows += rows_of(take_turns(candidates, options.rounds), setting)
            del candidates
    facts |= {"load_after": round(os.getloadavg()[0], 1), "not_measured": not_measured}
    print_results(rows, options, facts)
    for name, reason in not_measured.items():
        print(f"NOT MEASURED: {name}: {reason}", file=sys.stderr)
    if options.json:
        common.write_rows(options.json, rows, facts, PUBLISHED)
    return 0


def print_results(rows: list[dict[str, Any]], options: argparse.Namespace, facts: dict[str, Any]) -> None:
    print(
        f"\n{options.backbone}, batch 1, {options.size} px, windows of {options.window} frames; {options.rounds} rounds"
        f"\n{facts['cpu']}, {facts['cores']} cores, load {facts['load']} to {facts['load_after']}; torch {facts['torch']}; "
        f"{facts['date']}\nmedian [its 95% interval] of a call: a frame, or a whole window; ratios within a round"
    )
    for prefix, what in (("", "wall time"), ("cpu_", "CPU time, which other programs on the machine affect less")):
        print(f"\nratios of {what}")
        print_ratios(rows, prefix)
    print("\npublished, on other devices:")
    for each in PUBLISHED:
        print(f"  {each['network']} on {each['device']}: {each['ms']} ms, {each['fps']} frames/s; {each['published']}")


def print_ratios(rows: list[dict[str, Any]], prefix: str) -> None:
    """Print a line for each row, without ratios of a frame to a window, and the like."""
    against = {
        "stream": ("relative_to_plain",),
        "window": ("relative_to_stream", "relative_to_TSN"),
        "plain": (),
        "TSN": (),
    }
    names = ("times_as_fast_as_eager", "relative_to_plain", "relative_to_stream", "relative_to_TSN")
    lines = []
    for row in rows:
        kept = ("times_as_fast_as_eager", *against[row["network"]])
        cells = [row[prefix + name].show(digits=2) if name in kept and row[prefix + name] else "" for name in names]
        time_s = row["cpu_s" if prefix else "call_s"].show(1000, 2)
        what = f"{row['threads']} {row['runtime']} {row['precision']}"
        lines.append([what, row["network"], time_s, f"{1000 * row['p95_s']:.2f}", *cells])
    titles = ("threads, runtime", "network", "ms", "p95 (wall)", "eager / this", "/ plain", "/ stream", "/ TSN")
    common.print_table(titles, lines)


if __name__ == "__main__":
    sys.exit(main())

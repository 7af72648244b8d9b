"""Tools that the benchmarks share: statistics for a noisy machine, child processes that end with their parent, tables.

Two things are compared by taking turns in short blocks, so that a slow spell of the machine hits both, and by the ratio within
each pair of blocks. Intervals assume nothing about how times are distributed.
"""

import argparse
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import torch

from runtime.atomic_write import write_text

_GRACE_S = 10.0  # between asking a child to end and ending it
_LOG_LINES = 30  # of a failed child's output


# --------------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Interval:
    """A median, and what encloses the true one with at least the given confidence."""

    median: float
    low: float
    high: float

    def show(self, scale: float = 1.0, digits: int = 1) -> str:
        low, middle, high = (f"{value * scale:.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{middle} [{low}, {high}]"


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median and its distribution-free interval between two order statistics.

    The r-th smallest and r-th largest of n samples enclose the true median unless fewer than r samples fall on one side of it,
    which has probability `2 * P(Binomial(n, 1/2) < r)`. Fewer than 6 samples cannot give 95%: their whole range is returned.
    """
    ordered = sorted(samples)
    n, rank, outside = len(ordered), 1, 2 / 2 ** len(ordered)  # whole numbers: floats end at 2^1024
    while rank < n / 2 and outside + (more := 2 * math.comb(n, rank) / 2**n) <= 1.0 - confidence:
        outside, rank = outside + more, rank + 1
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[n - rank])


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median ratio of samples that were taken in pairs, next to each other in time, and its interval."""
    return median_interval([above / below for above, below in zip(numerators, denominators, strict=True)], confidence)


@dataclass(frozen=True)
class Clock:
    """Wall time, and this process' time on the CPU (all its threads), which other programs on the machine hardly change."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls, device: str = "cpu") -> "Clock":
        """`device`: whose work before this moment has to be done."""
        if device == "cuda":
            torch.cuda.synchronize()
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Clock", steps: int) -> "Clock":
        """Time a step, of `steps` steps that began at `start`."""
        return Clock((self.wall_s - start.wall_s) / steps, (self.cpu_s - start.cpu_s) / steps)


# ---------------------------------------------------------------------------------------------------------- child processes


class ChildFailed(RuntimeError):
    """A child process ended with an error; the message has the end of what it said."""


def run_child(command: Sequence[str], log: Path, environ: Mapping[str, str], timeout_s: float = 3600.0) -> None:
    """Run a command to its end with its output in a log. However this process ends, the child and its own do not stay."""
    _turn_sigterm_into_exit()
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the child in order.
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environ}, start_new_session=True
        )
        try:
            code = child.wait(timeout_s)
        finally:
            _end_group(child)
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        raise ChildFailed(f"{' '.join(command[:8])} ... ended with {code}:\n{tail}")


def launch_command(backend: str, size: int, program: str) -> list[str]:
    """Return the command that starts `size` processes of a Python program on a backend."""
    if backend == "torch":
        module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        return [sys.executable, *module, program]
    horovodrun = [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "-np", str(size)]
    return [*(horovodrun if backend == "horovod" else []), sys.executable, program]


def _turn_sigterm_into_exit() -> None:
    def leave(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def _end_group(child: "subprocess.Popen[bytes]") -> None:
    """The launcher is asked first: torchrun's and horovodrun's processes are in sessions that it alone knows."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def end_with(parent: int) -> None:
    """Called in a child of a launcher: end this process when the benchmark's own process is gone, whatever killed it."""

    def watch() -> None:
        while Path(f"/proc/{parent}").exists():
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


# ------------------------------------------------------------------------------------------------------------------- output


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="show that it works; the numbers say little")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows with the facts of the machine to FILE"
    )
    return parser


def machine_facts(threads: int) -> dict[str, Any]:
    """Facts of the machine that the results depend on; `load` is the machine's one-minute average before the benchmark."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need be: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, ["-" * width for width in widths], *rows):
        first, *others = row
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """A JSON list of rows, each with the facts of the machine; intervals become {"median", "low", "high"}."""
    plain = [
        {name: asdict(value) if isinstance(value, Interval) else value for name, value in row.items()} | dict(facts)
        for row in rows
    ]
    write_text(path, json.dumps(plain, indent=1) + "\n")

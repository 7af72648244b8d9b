"""Helpers for the benchmarks: statistics for a noisy machine, child processes that end with their parent, tables.

Two candidates are compared in short alternating blocks, so that a slow phase of the machine affects both, and by the ratio within
each pair of blocks. The confidence intervals are distribution-free.
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

# Between SIGTERM and SIGKILL.
_GRACE_S = 10.0
# Lines of a failed child's output in the error message.
_LOG_LINES = 30


# --------------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Interval:
    """A median of samples with its confidence interval."""

    median: float
    low: float
    high: float

    def show(self, scale: float = 1.0, digits: int = 1) -> str:
        low, middle, high = (f"{value * scale:.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{middle} [{low}, {high}]"


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the median and its distribution-free confidence interval between two order statistics.

    The r-th smallest and r-th largest of n samples enclose the true median unless fewer than r samples fall on one side of it,
    which has probability `2 * P(Binomial(n, 1/2) < r)`. Fewer than 6 samples cannot give 95%; then the interval is their
    whole range.
    """
    ordered = sorted(samples)
    # Integer powers: a float overflows at 2^1024.
    n, rank, outside = len(ordered), 1, 2 / 2 ** len(ordered)
    while rank < n / 2 and outside + (more := 2 * math.comb(n, rank) / 2**n) <= 1.0 - confidence:
        outside, rank = outside + more, rank + 1
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[n - rank])


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the median ratio of paired samples, taken right after each other, with its confidence interval."""
    return median_interval([above / below for above, below in zip(numerators, denominators, strict=True)], confidence)


@dataclass(frozen=True)
class Clock:
    """Wall time, and this process's CPU time over all threads, which other programs on the machine hardly affect."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls, device: str = "cpu") -> "Clock":
        """Read the clocks after all work queued on `device` is done."""
        if device == "cuda":
            torch.cuda.synchronize()
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Clock", steps: int) -> "Clock":
        """Return the time per step of `steps` steps that began at `start`."""
        return Clock((self.wall_s - start.wall_s) / steps, (self.cpu_s - start.cpu_s) / steps)


# ---------------------------------------------------------------------------------------------------------- child processes


class ChildFailed(RuntimeError):
    """A child process that failed; the message contains the end of its output."""


def run_child(command: Sequence[str], log: Path, environ: Mapping[str, str], timeout_s: float = 3600.0) -> None:
    """Run a command and write its output to `log`; on exit kill the child and its descendants."""
    _turn_sigterm_into_exit()
    with log.open("wb") as output:
        # A new session: Ctrl-C signals only this process, which then terminates the child.
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
    """Return the command that starts `size` processes of a Python program for a backend."""
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
    """Send SIGTERM to the launcher, then SIGKILL: only torchrun and horovodrun know the sessions of their ranks."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def end_with(parent: int) -> None:
    """Exit this process, a launcher's child, as soon as the benchmark's process `parent` is gone."""

    def watch() -> None:
        while Path(f"/proc/{parent}").exists():
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


# ------------------------------------------------------------------------------------------------------------------- output


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="show that it works; the numbers say little")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows with the facts of the machine to FILE"
    )
    return parser


def machine_facts(threads: int) -> dict[str, Any]:
    """Return the machine facts that affect results; `load` is the one-minute load average before the benchmark."""
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
    """Print a table with the first column left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, ["-" * width for width in widths], *rows):
        first, *others = row
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def write_rows(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    published: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a JSON list of rows, each with the machine facts; an interval becomes {"median", "low", "high"}.

    `published`: rows of other people's figures, which have nothing to do with this machine.
    """
    plain: list[Mapping[str, Any]] = [
        {name: asdict(value) if isinstance(value, Interval) else value for name, value in row.items()} | dict(facts)
        for row in rows
    ]
    write_text(path, json.dumps([*plain, *published], indent=1) + "\n")

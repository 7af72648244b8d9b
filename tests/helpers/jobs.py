"""Whole jobs for tests: start train.py with a launcher and collect output, exit code, processes left and last checkpoint."""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from distributed.checkpoint.store import load_newest
from training.telemetry.records import read_metrics

from .processes import processes_with
from .worlds import CHECKOUT, MARK, World


@dataclass(frozen=True)
class Ended:
    """The result of a job that has ended."""

    exit_code: int
    output: str
    duration_s: float
    left_running: list[str]


class RunningJob:
    """A job in its own process group, as a terminal starts one; every process carries a mark in its environment."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._mark = uuid.uuid4().hex
        self.log = log
        self._started_s = time.monotonic()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=CHECKOUT,
                env=environment | {MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def interrupt(self) -> None:
        """Send SIGINT to the whole process group, as a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def ranks(self) -> dict[int, int]:
        """Return the pid of the process of each rank that runs train.py now."""
        found = {}
        for pid, command in self.processes().items():
            words = command.split()
            if "python" not in words[0] or "train.py" not in words[1:3]:
                continue
            # The process may have ended meanwhile.
            with suppress(OSError):
                environ = dict(
                    entry.split("=", 1)
                    for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")
                    if "=" in entry
                )
                names = ("TSM_LOCAL_RANK", "RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK")
                found[next((int(environ[name]) for name in names if name in environ), 0)] = pid
        return found

    def loader_workers(self, rank: int) -> list[int]:
        """Return the decoding processes of a rank, which are children of its fork server."""
        parents = {pid: _parent(pid) for pid in self.processes()}
        servers = {pid for pid, parent in parents.items() if parent == self.ranks()[rank]}
        return sorted(pid for pid, parent in parents.items() if parent in servers)

    def wait(self, limit_s: float) -> Ended:
        """Wait for the end; raise AssertionError with the output if the job is still running after `limit_s`."""
        started_s = time.monotonic()
        try:
            exit_code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {limit_s} s:\n{self.log.read_text()[-5000:]}") from None
        duration_s = time.monotonic() - started_s
        # The fork server of the loader workers notices the end of its job only after importing torch, seconds later on
        # a busy machine.
        deadline_s = time.monotonic() + 30
        while self.processes() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        left = list(self.processes().values())
        self.kill()
        return Ended(exit_code, self.log.read_text(), duration_s, left)

    def kill(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def processes(self) -> dict[int, str]:
        """Return the command line of every living process of the job, by pid."""
        return processes_with(MARK, self._mark)


def _parent(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))


def make_clips(root: Path) -> Path:
    """Write the shapes data set with 40 training and 20 validation clips: a copy of those that this process has generated."""
    return shutil.copytree(_generated_clips(), root)


@cache
def _generated_clips() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="test-clips-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sizes = ["--train-clips", "40", "--val-clips", "20"]
    command = [sys.executable, "prepare.py", "shapes", "--root", str(folder), *sizes]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True)
    return folder


def start_training(
    world: World, log: Path, *overrides: str, rank_variable: str | None = None, program: str = "train.py"
) -> RunningJob:
    """Start train.py in a world; `rank_variable` sets each rank's `seed=` from that variable, so that ranks disagree."""
    if rank_variable is None:
        return RunningJob(world.command(program, *overrides), world.environment, log)
    script = log.with_suffix(".py")
    script.write_text(
        "import os, sys\n"
        f"os.execv(sys.executable, [sys.executable, 'train.py', *sys.argv[1:], 'seed=' + os.environ['{rank_variable}']])\n"
    )
    return RunningJob(world.command(str(script), *overrides), world.environment, log)


def wait_for_record(metrics: Path, kind: str, limit_s: float = 120, step: int = 0) -> None:
    """Wait until a run has written a record of this kind at this step or later."""
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        records = read_metrics(metrics) if metrics.exists() else []
        if any(record["kind"] == kind and record["step"] >= step for record in records):
            return
        time.sleep(0.1)
    raise AssertionError(f"no {kind} record of step {step} or later in {metrics} after {limit_s} s")


def differing(one: Path, other: Path, step: int) -> list[str]:
    """Return the names of tensors that are not bit-equal in the last checkpoints of two runs, both of this step."""
    ours, theirs = last_checkpoint(one, step), last_checkpoint(other, step)
    names = sorted(ours.keys() | theirs.keys())
    return [
        name for name in names if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]


def last_checkpoint(run: Path, step: int) -> dict[str, Tensor]:
    """Return the tensors of a run's last checkpoint, which must be of this step."""
    checkpoint, broken = load_newest(run / "checkpoints")
    assert checkpoint is not None and not broken, broken
    assert checkpoint.state["step"] == step
    best = torch.tensor(checkpoint.state["best_top1_percent"], dtype=torch.float64)
    return checkpoint.network | checkpoint.optimizer | {"best_top1_percent": best}

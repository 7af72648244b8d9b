"""Write the last checkpoint of a run: try again while that fails, then write it to a second place.

Without it the result of the run is lost. Ranks wait in rounds of seconds, because a collective has a time limit.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path

from distributed.checkpoint.writer import CheckpointWriter
from runtime.checkout import CHECKOUT
from training.errors import StorageError

from .job import Job

RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Waits between attempts; the last of them is repeated."""

_STOPPED_RETRY_S = 1.0
"""`checkpoint.last_retry_s` after a stop by a signal: one attempt, because a scheduler may leave only seconds."""

_ROUND_S = 5.0
"""Time that the other ranks wait in one collective."""


@dataclass(frozen=True)
class LastWrite:
    """How far the write of the last checkpoint is. Rank 0 sends it to all ranks."""

    is_over: bool = False
    is_retrying: bool = False
    failed: str | None = None
    """The reason why it is not in the run folder."""
    second_place: str | None = None
    """The folder that has it instead, if any."""
    host: str = ""


def wait_for_all(
    job: Job, step: int, updates: Iterator[LastWrite] | None, stop_wanted: Callable[[], bool]
) -> LastWrite:
    """Wait on all ranks until rank 0, which has the `updates`, has written the last checkpoint or given up. Collective."""
    while True:
        # A stop signal may reach another rank only.
        stop_wanted()
        update = LastWrite(**job.backend.broadcast_object(None if updates is None else asdict(next(updates))))
        if update.is_over:
            return update
        if update.is_retrying:
            # The time for this is limited: it is no hang.
            job.control.progress(step, "checkpoint")


class LastCheckpoint:
    """Rank 0's attempts to write the last checkpoint."""

    def __init__(
        self, job: Job, writer: CheckpointWriter, log: Callable[[str], None], report: Callable[[], str | None]
    ) -> None:
        """`report` records the writes that have ended, and returns why the newest one failed, if it did."""
        self._job, self._writer, self._log, self._report = job, writer, log, report
        self._settings = job.config.checkpoint

    def updates(self, stopped: bool, stop_wanted: Callable[[], bool]) -> Iterator[LastWrite]:
        """Wait for the write, and write again while it fails; yields every few seconds.

        `stopped`: the run was stopped by a signal. `stop_wanted` returns whether a rank got a stop signal.
        """
        yield from self._wait(LastWrite())
        failed, attempts, limit_s = self._report(), 1, self._settings.last_retry_s
        if stopped:
            limit_s, stop_wanted = min(limit_s, _STOPPED_RETRY_S), _never
        waits = retry_waits(limit_s)
        while failed is not None and not stop_wanted() and (wait_s := next(waits, None)) is not None:
            self._log(f"checkpoint: trying again in {wait_s:.3g} s, for at most {limit_s:g} s")
            yield from _pause(wait_s, stop_wanted)
            attempts += 1
            self._writer.write_again()
            yield from self._wait(LastWrite(is_retrying=True))
            failed = self._report()
        if failed is None:
            if attempts > 1:
                self._log(f"checkpoint: written in attempt {attempts}")
            yield LastWrite(is_over=True)
        elif stopped:
            # The next start repeats the steps since the checkpoint before.
            yield LastWrite(is_over=True, failed=failed)
        else:
            yield from self._write_to_second_place(f"{failed} ({attempts} attempts)")

    def _write_to_second_place(self, failed: str) -> Iterator[LastWrite]:
        try:
            folder = self._second_place()
        except OSError as error:
            yield LastWrite(is_over=True, failed=f"{failed}; nor in a second place: {error}")
            return
        self._log(f"checkpoint: writing it to {folder}")
        self._writer.write_again(folder)
        yield from self._wait(LastWrite(is_retrying=True))
        for written in self._writer.ended():
            if written.failed is None:
                place, host = str(folder / f"step-{written.step:08d}"), self._job.backend.topology.host
                yield LastWrite(is_over=True, failed=failed, second_place=place, host=host)
            else:
                yield LastWrite(is_over=True, failed=f"{failed}; nor in a second place: {written.failed}")

    def _second_place(self) -> Path:
        """Make the folder for a checkpoint that the run folder cannot take, and return it."""
        run_id = self._job.folder.path.name
        if self._settings.second_place is None:
            # Only this user can read it, and nobody else can have made it.
            return Path(tempfile.mkdtemp(prefix=f"tsm-{run_id}-"))
        folder = CHECKOUT / self._settings.second_place / run_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _wait(self, update: LastWrite) -> Iterator[LastWrite]:
        while not self._writer.wait(_ROUND_S):
            yield update


def retry_waits(limit_s: float) -> Iterator[float]:
    """Yield the waits before further attempts, until `limit_s` from now have passed."""
    end_s = time.monotonic() + limit_s
    for wait_s in chain(RETRY_WAITS_S, repeat(RETRY_WAITS_S[-1])):
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            return
        yield min(wait_s, left_s)


def _pause(wait_s: float, cut_short: Callable[[], bool]) -> Iterator[LastWrite]:
    end_s = time.monotonic() + wait_s
    while (left_s := end_s - time.monotonic()) > 0 and not cut_short():
        time.sleep(min(left_s, _ROUND_S))
        yield LastWrite(is_retrying=True)


def _never() -> bool:
    return False


def check_finished(last: LastWrite, step: int, checkpoints: Path) -> None:
    """Raise StorageError if a finished run's last checkpoint is not in its folder, with the place that has it instead."""
    if last.failed is None:
        return
    what = f"the run has ended at step {step}, and its last checkpoint could not be written: {last.failed}"
    fix = "Fix: make room, or bring the folder back, then"
    if last.second_place is None:
        raise StorageError(f"{what}. {fix} start the run again: it resumes from the checkpoint before")
    raise StorageError(
        f"{what}. It is in {last.second_place} on {last.host}. {fix} there: cp -r {last.second_place} {checkpoints}/ "
        "and start the run again: it is complete then. Without the copy it resumes from the checkpoint before"
    )

"""Checkpoints written behind the training: a save holds its caller up for a copy in memory, a thread does the rest."""

import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from .store import Checkpoint, CheckpointError, Snapshot, write_snapshot


@dataclass(frozen=True)
class Written:
    """What became of a save. Times are seconds."""

    step: int
    stall_s: float
    """That `save` held its caller up."""
    waited_s: float
    """The part of `stall_s` that the write before still took."""
    duration_s: float
    """From the call of `save` until the checkpoint was on disk, or had failed."""
    failed: str | None
    """Why it could not be written."""


class CheckpointWriter:
    """Writes one checkpoint at a time into a folder; one thread of one process calls it.

    `keep` and `best` as in `write_snapshot`.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._ended: deque[Written] = deque()
        self._fault: Exception | None = None

    def save(self, checkpoint: Checkpoint, best: bool = False) -> None:
        """Copy the tensors, which may change afterwards, and begin to write them. Waits for a write that has not ended."""
        called_s = time.monotonic()
        self.wait()
        waited_s = time.monotonic() - called_s
        self._snapshot.take(checkpoint)
        stall_s = time.monotonic() - called_s
        # A daemon: a disk that hangs must not keep a process that failed from ending. Those who end in order wait.
        self._thread = threading.Thread(
            target=self._write, args=(called_s, stall_s, waited_s, best), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self, limit_s: float | None = None) -> None:
        """Until no write is under way, or `limit_s` is over."""
        if self._thread is not None:
            self._thread.join(limit_s)

    def ended(self) -> list[Written]:
        """What became of the saves whose writes have ended since the last call; raises a fault of the program in one."""
        if self._fault is not None:
            raise self._fault
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def _write(self, called_s: float, stall_s: float, waited_s: float, best: bool) -> None:
        failed = None
        try:
            write_snapshot(self._folder, self._snapshot, self._keep, best)
        except CheckpointError as error:
            failed = str(error)
        except Exception as error:
            self._fault = error
        duration_s = time.monotonic() - called_s
        self._ended.append(Written(self._snapshot.step, stall_s, waited_s, duration_s, failed))

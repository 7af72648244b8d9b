"""Asynchronous checkpoint writes: a save blocks only for a copy to host memory, and a thread writes the files."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .store import Checkpoint, CheckpointError, Snapshot, write_snapshot


@dataclass(frozen=True)
class Written:
    """The result of a save."""

    step: int
    stall_s: float
    """The time that `save` blocked its caller."""
    waited_s: float
    """The part of `stall_s` spent waiting for the previous write."""
    duration_s: float
    """From the call of `save` until the checkpoint was on disk, or had failed."""
    failed: str | None
    """The reason why it could not be written; None if it was."""


class CheckpointWriter:
    """Writes one checkpoint at a time into a folder. Call it from one thread of one process only.

    `keep`, `best` and `check`, which a thread calls, are those of `write_snapshot`.
    """

    def __init__(self, folder: Path, keep: int, check: Callable[[], object] = lambda: None) -> None:
        self._folder, self._keep, self._check = folder, keep, check
        self._snapshot = Snapshot()
        self._best = False
        self._thread: threading.Thread | None = None
        self._ended: deque[Written] = deque()
        self._error: Exception | None = None

    def save(self, checkpoint: Checkpoint, best: bool = False) -> None:
        """Copy the tensors, which may change afterwards, and start to write them. Waits for an unfinished write first."""
        called_s = time.monotonic()
        self.wait()
        waited_s = time.monotonic() - called_s
        self._snapshot.take(checkpoint)
        self._best = best
        self._start(self._folder, called_s, time.monotonic() - called_s, waited_s)

    def write_again(self, folder: Path | None = None) -> None:
        """Start to write the newest save again, after `wait`; into another existing folder if one is given."""
        self._start(folder or self._folder, time.monotonic(), 0.0, 0.0)

    def wait(self, limit_s: float | None = None) -> bool:
        """Wait until no write is in progress, at most `limit_s`; returns whether none is."""
        if self._thread is None:
            return True
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    def ended(self) -> list[Written]:
        """Return the saves that finished since the last call; raises an error that is not a CheckpointError, such as a bug."""
        if self._error is not None:
            raise self._error
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def _start(self, folder: Path, called_s: float, stall_s: float, waited_s: float) -> None:
        # A daemon thread: a disk that hangs must not block the exit of a process that failed. A normal exit calls `wait`.
        self._thread = threading.Thread(
            target=self._write, args=(folder, called_s, stall_s, waited_s), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _write(self, folder: Path, called_s: float, stall_s: float, waited_s: float) -> None:
        failed = None
        try:
            write_snapshot(folder, self._snapshot, self._keep, self._best, self._check)
        except CheckpointError as error:
            failed = str(error)
        except Exception as error:
            self._error = error
        duration_s = time.monotonic() - called_s
        self._ended.append(Written(self._snapshot.step, stall_s, waited_s, duration_s, failed))

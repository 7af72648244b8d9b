"""Run a function over many items in worker processes that may crash: a decoder's crash costs only its own file."""

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from runtime.child_processes import exit_with_parent

# A process killed from outside (out of memory) says nothing about its item, so try the item again.
_ATTEMPTS = 2


@dataclass(frozen=True)
class Died:
    """Stands for a result: the worker process died on the item in every attempt."""

    how: str
    """The signal or exit code."""
    work: str

    @property
    def reason(self) -> str:
        """Text for the report."""
        return f"the worker process died twice while {self.work} it ({self.how})"


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    item: int | None = None
    """Index of the item it works on; None until the process has started."""


def run_guarded(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    workers: int,
    work: str,
    name_of: Callable[[Any], str] = str,
) -> Generator[tuple[int, Any], None, None]:
    """Yield (index, function(item)) of every item, in order of completion; Died in place of a result if the process died.

    `work` ("scanning") and `name_of(item)` (a path) describe in errors what failed. `workers` is the number of processes,
    which import the function (spawn); 0 runs it in this process, unguarded. Closing the generator, or an exception while it
    runs, kills all processes. An exception of the function raises RuntimeError.
    """
    if workers == 0:
        yield from ((index, function(item)) for index, item in enumerate(items))
        return
    pool = _Pool(function, items, work, name_of)
    try:
        yield from pool.run(workers)
    finally:
        pool.kill()


class _Pool:
    """The worker processes, and the items that wait for one."""

    def __init__(
        self, function: Callable[[Any], Any], items: Sequence[Any], work: str, name_of: Callable[[Any], str]
    ) -> None:
        self._function = function
        self._items = items
        self._work = work
        self._name_of = name_of
        self._waiting = deque(range(len(items)))
        self._failures: Counter[int] = Counter()
        self._died_at_start = 0
        self._workers: list[_Worker] = []

    def run(self, workers: int) -> Iterator[tuple[int, Any]]:
        for _ in range(min(workers, len(self._items))):
            self._workers.append(_start(self._function))
        while self._workers:
            for pipe in wait([worker.pipe for worker in self._workers]):
                yield from self._receive(next(worker for worker in self._workers if worker.pipe is pipe))

    def kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    def _receive(self, worker: _Worker) -> Iterator[tuple[int, Any]]:
        """Take the worker's result, or its first message, which reports that it has started."""
        try:
            result = worker.pipe.recv()
        except (EOFError, OSError):
            yield from self._replace(worker)
            return
        item = worker.item
        if isinstance(result, _Raised) and item is not None:
            raise RuntimeError(f"{self._work} {self._name_of(self._items[item])} failed: {result.text}")
        # Hand out work before the caller processes the result, so that the worker does not wait for the caller.
        self._give_next(worker)
        if item is not None:
            yield item, result

    def _replace(self, worker: _Worker) -> Iterator[tuple[int, Died]]:
        """Start another process for one that died; give up an item on which two have died."""
        died = Died(_end_of(worker.process), self._work)
        self._workers.remove(worker)
        if worker.item is None:
            self._check_start(worker, died)
        self._workers.append(_start(self._function))
        # Killed from outside, before it had an item.
        if worker.item is None:
            return
        self._failures[worker.item] += 1
        if self._failures[worker.item] < _ATTEMPTS:
            self._waiting.appendleft(worker.item)
        else:
            yield worker.item, died

    def _check_start(self, worker: _Worker, died: Died) -> None:
        """Raise RuntimeError if the process ended by itself before its first item, or too many were killed there."""
        self._died_at_start += 1
        if (worker.process.exitcode or 0) >= 0 or self._died_at_start == _ATTEMPTS:
            raise RuntimeError(
                f"{self._work} failed: a worker process ended before its first file ({died.how}). "
                "Fix: read its output above"
            )

    def _give_next(self, worker: _Worker) -> None:
        """Send the worker its next item, or end it when none is left."""
        if not self._waiting:
            worker.pipe.close()
            worker.process.join()
            self._workers.remove(worker)
            return
        worker.item = self._waiting.popleft()
        # When the worker has just died, the next receive from it reports that.
        with suppress(OSError):
            worker.pipe.send(self._items[worker.item])


@dataclass(frozen=True)
class _Raised:
    """An exception of the function, sent from the worker process."""

    text: str


def _start(function: Callable[[Any], Any]) -> _Worker:
    # spawn: a fork would inherit the caller's threads, locks and GPU context.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, theirs), daemon=True)
    # The resource tracker unblocks SIGINT when it starts, so start it before the signal is blocked.
    resource_tracker.ensure_running()
    # A child inherits the signal mask. Ctrl-C reaches the terminal's whole process group; only the parent handles it.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    theirs.close()
    return _Worker(process, ours)


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    exit_with_parent()
    # Report that the process has started.
    pipe.send(None)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            result = function(item)
        except Exception as error:
            result = _Raised(f"{type(error).__name__}: {error}")
        pipe.send(result)


def _end_of(process: multiprocessing.process.BaseProcess) -> str:
    process.join()
    code = process.exitcode or 0
    return f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"

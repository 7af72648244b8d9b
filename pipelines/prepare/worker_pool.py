"""Run a function over many items in worker processes that may crash: a decoder's crash costs only its own file."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
) -> Iterator[tuple[int, Any]]:
    """Yield (index, function(item)) of every item, in the order in which they finish; Died where the process did not survive.

    `work` and `name_of(item)` name in errors what failed: "scanning" and a file's path.
    `workers`: processes (spawned: the function is imported there); 0 works in this one, unguarded. Close the iterator, or
    leave it by an exception, and all processes end at once. An exception of the function's own ends it with RuntimeError.
    """
    if workers == 0:
        yield from ((index, function(item)) for index, item in enumerate(items))
        return
    waiting, failures = deque(range(len(items))), dict.fromkeys(range(len(items)), 0)
    killed_at_start = 0
    crew = [_start(function) for _ in range(min(workers, len(items)))]
    try:
        while crew:
            for pipe in wait([worker.pipe for worker in crew]):
                worker = next(worker for worker in crew if worker.pipe is pipe)
                try:
                    result = worker.pipe.recv()
                except (EOFError, OSError):
                    died = _died(worker)
                    crew.remove(worker)
                    if worker.item is None:
                        killed_at_start += 1
                        _check_start(worker, died, killed_at_start, work)
                    crew.append(_start(function))
                    # Killed from outside, before it had an item.
                    if worker.item is None:
                        continue
                    failures[worker.item] += 1
                    if failures[worker.item] < _ATTEMPTS:
                        waiting.appendleft(worker.item)
                    else:
                        yield worker.item, died
                    continue
                item = worker.item
                if isinstance(result, _Raised) and item is not None:
                    raise RuntimeError(f"{work} {name_of(items[item])} failed: {result.text}")
                _give_next(worker, waiting, items, crew)  # before the caller looks at the result
                if item is not None:
                    yield item, result
    finally:
        for worker in crew:
            worker.process.kill()
        for worker in crew:
            worker.process.join()


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


def _give_next(worker: _Worker, waiting: deque[int], items: Sequence[Any], crew: list[_Worker]) -> None:
    """Send the worker its next item, or end it when none is left."""
    if not waiting:
        worker.pipe.close()
        worker.process.join()
        crew.remove(worker)
        return
    worker.item = waiting.popleft()
    # When the worker has just died, the next receive from it reports that.
    with suppress(OSError):
        worker.pipe.send(items[worker.item])


def _check_start(worker: _Worker, died: Died, attempts: int, work: str) -> None:
    """Raise RuntimeError for a process that ended by itself before its first file, or that was killed there too often."""
    if (worker.process.exitcode or 0) >= 0 or attempts == _ATTEMPTS:
        raise RuntimeError(
            f"{work} failed: a worker process ended before its first file ({died.how}); its output above says why"
        )


def _died(worker: _Worker) -> Died:
    worker.process.join()
    code = worker.process.exitcode or 0
    return Died(f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}")

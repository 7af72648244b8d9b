"""A function over many items in processes that may die: a decoder's crash on one file costs that file and nothing else."""

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

_ATTEMPTS = 2  # a process that was killed from outside (out of memory) says nothing about its item: one more try


@dataclass(frozen=True)
class Died:
    """In place of a result: the process that worked on the item ended, in each attempt."""

    how: str


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    item: int | None = None
    """The index of the item that it has; None until it has started up."""


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
                    if worker.item is None:  # killed from outside, and it had nothing
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
    text: str


def _start(function: Callable[[Any], Any]) -> _Worker:
    context = multiprocessing.get_context("spawn")  # no thread, lock or GPU of the caller is taken along
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, theirs), daemon=True)
    resource_tracker.ensure_running()  # which unblocks SIGINT once it has started: not behind the next lines' back
    # A child inherits the mask: Ctrl-C reaches the whole terminal's group, but the parent alone decides what it means.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    theirs.close()
    return _Worker(process, ours)


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    exit_with_parent()
    pipe.send(None)  # started up
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
    """Hand out the next item, or let the process go when there is none."""
    if not waiting:
        worker.pipe.close()
        worker.process.join()
        crew.remove(worker)
        return
    worker.item = waiting.popleft()
    with suppress(OSError):  # it died just now: receiving from it will say so
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

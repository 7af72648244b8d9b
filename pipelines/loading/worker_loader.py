"""Batches of clips from worker processes, in a given order, for torch on any device."""

import atexit
import multiprocessing
import multiprocessing.connection
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from runtime.child_processes import exit_with_parent


class WorkerLostError(RuntimeError):
    """A loader's worker process has ended, and not by itself."""


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def start_worker_server() -> None:
    """Start the process that loader workers are forked from; call it before MPI, Horovod or CUDA live in this process.

    The server imports what workers need once. It ignores what asks a job to stop, which reaches every process of a terminal
    (Ctrl-C) or of a Slurm step: the training process decides when workers end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.worker_server"])
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    """Behind a training process that ends, multiprocessing would wait for a worker that is blocked: it sends SIGTERM alone."""
    for child in multiprocessing.active_children():
        child.kill()


_Batch = TypeVar("_Batch")


class ClipLoader(Generic[_Batch]):
    """Yields `dataset[item]` for each item of a plan, in order, decoded ahead by `workers` processes (0: in this one)."""

    def __init__(self, dataset: Dataset[_Batch], workers: int, prefetch: int, pin_memory: bool = False) -> None:
        self._dataset = dataset
        self._options: dict[str, Any] = {"batch_size": None, "collate_fn": _as_is, "pin_memory": pin_memory}
        if workers > 0:
            self._options |= {
                "num_workers": workers,
                "prefetch_factor": prefetch,
                "multiprocessing_context": "forkserver",
                "worker_init_fn": _prepare_worker,
            }

    def batches(self, plan: Iterable[Any]) -> Iterator[_Batch]:
        """Batches of the plan's items; worker processes live until the iterator is exhausted or dropped.

        Raises WorkerLostError within seconds of a worker's death.
        """
        with _main_unknown():
            batches = iter(DataLoader(self._dataset, sampler=plan, **self._options))  # type: ignore[arg-type]
        try:
            yield from batches
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # The last three: it died while a batch was on its way. What is raised in a worker says that it was caught there.
            connection = not isinstance(error, RuntimeError) and self._options.get("num_workers", 0) > 0
            if "in DataLoader worker process" in str(error) or not (connection or "DataLoader worker" in str(error)):
                raise
            which = f"pid {_ended(batches._workers)}, {error}" if connection else str(error)  # type: ignore[attr-defined]
            raise WorkerLostError(
                f"a process that decodes clips was killed: {which}. The kernel does so when memory runs out: "
                "see dmesg. Fix: fewer pipeline.workers, or a smaller pipeline.prefetch"
            ) from error
        finally:
            if "num_workers" in self._options:
                # An error's traceback holds it in a cycle, out of which it can no longer tell its processes to end.
                batches._shutdown_workers()  # type: ignore[attr-defined]


def _ended(workers: list[BaseProcess]) -> str:
    """Which of them have ended; the end of a connection to one may be known a moment before its own."""
    multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=5)
    return " and ".join(str(worker.pid) for worker in workers if not worker.is_alive()) or "unknown"


@contextmanager
def _main_unknown() -> Iterator[None]:
    """Processes that are started within do not import this process' program, which multiprocessing has them do first.

    They need nothing of it. It would take each of them seconds, and hundreds of MB: all of training, with what that imports.
    """
    main = sys.modules["__main__"]
    known = getattr(main, "__file__", None), main.__spec__
    main.__file__ = main.__spec__ = None
    try:
        yield
    finally:
        main.__file__, main.__spec__ = known


def _as_is(batch: _Batch) -> _Batch:
    return batch


def _prepare_worker(worker: int) -> None:
    """To stop is the training process' business, and a worker must not outlive it, however it ends."""
    for number in STOP_SIGNALS:  # torch has set a handler of its own for one of them
        signal.signal(number, signal.SIG_IGN)
    exit_with_parent()

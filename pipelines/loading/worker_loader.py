"""Load batches in worker processes, in a given order, for torch on any device."""

import atexit
import multiprocessing
import multiprocessing.connection
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from pipelines.errors import StorageFault
from runtime import stop_signals
from runtime.child_processes import exit_with_parent
from runtime.console import ignore_write_errors
from runtime.leftovers import hold_socket_folder

from .hand_over import Delivery, hand_over


class WorkerLostError(RuntimeError):
    """A loader's worker process was killed."""


class HandOverError(RuntimeError):
    """Workers cannot be started, or cannot hand over a batch, for a limit of this machine: a restart would fail again."""


def start_worker_server() -> None:
    """Start the fork server of the loader workers; call it before this process initializes MPI, Horovod or CUDA.

    The server imports what workers need, once. Stop signals, which reach every process of a terminal (Ctrl-C) or of a Slurm
    step, do not reach it: the training process decides when workers end.
    """
    hold_socket_folder()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.worker_server"])
    # The resource tracker unblocks signals when it starts, so start it first.
    with stop_signals.hidden_from_children():
        resource_tracker.ensure_running()
    with stop_signals.hidden_from_children():
        forkserver.ensure_running()
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    """Kill all workers. At exit multiprocessing sends SIGTERM, which workers ignore, and joins: it would hang."""
    for child in multiprocessing.active_children():
        child.kill()


_Batch = TypeVar("_Batch")


class ClipLoader(Generic[_Batch]):
    """Yields `dataset[index]` for each batch index, in order, decoded ahead by `workers` processes (0: by this process).

    Each worker imports the program that uses the loader again, as `__mp_main__`: keep the program's imports and work under
    its `if __name__ == "__main__"`.
    """

    def __init__(
        self,
        dataset: Dataset[_Batch],
        workers: int,
        prefetch: int,
        pin_memory: bool = False,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        """`warn` gets the reason, once, if batches cannot go through shared memory."""
        self._dataset, self._workers = dataset, workers
        self._warn: Callable[[str], None] | None = warn
        self._options: dict[str, Any] = {"batch_size": None, "collate_fn": _identity, "pin_memory": pin_memory}
        if workers > 0:
            self._options |= {
                "num_workers": workers,
                "prefetch_factor": prefetch,
                "multiprocessing_context": "forkserver",
                "worker_init_fn": _prepare_worker,
                "collate_fn": hand_over,
            }

    def batches(self, batch_indices: Iterable[Any]) -> Iterator[_Batch]:
        """Load one batch per index; worker processes live until the iterator is exhausted or dropped.

        Raises WorkerLostError within seconds of a worker's death, and HandOverError if batches cannot reach this process.
        """
        loader = DataLoader(self._dataset, sampler=batch_indices, **self._options)  # type: ignore[arg-type]
        if not self._workers:
            yield from loader
            return
        batches = _started(loader)
        try:
            for delivery in batches:
                yield self._received(delivery)
        except (RuntimeError, OSError, EOFError) as error:
            explained = _explain(error, batches._workers)
            if explained is None:
                raise
            raise explained from error
        finally:
            # An error's traceback keeps torch's iterator in a reference cycle, which would delay the workers' end.
            batches._shutdown_workers()

    def _received(self, delivery: Delivery) -> _Batch:
        if delivery.failure:
            raise RuntimeError(f"a loader worker could not hand over a batch:\n{delivery.failure}")
        if delivery.pipe_reason and self._warn is not None:
            self._warn(
                f"loader: batches go through pipes, which takes more time, because shared memory is short: {delivery.pipe_reason}. "
                "Fix: docker --shm-size=8g, or fewer pipeline.workers and pipeline.prefetch"
            )
            self._warn = None
        return delivery.batch


def _started(loader: Any) -> Any:
    """Start the loader's workers. Raises HandOverError."""
    try:
        return iter(loader)
    except (OSError, EOFError, RuntimeError) as error:
        reason = "their fork server ended (see its message above)" if isinstance(error, EOFError) else str(error)
        raise HandOverError(
            f"loader workers cannot be started: {reason}. Fix: fewer pipeline.workers, or a higher limit "
            "(ulimit -n for files, ulimit -u or docker --pids-limit for processes, docker --shm-size for shared memory)"
        ) from error


def _explain(error: Exception, workers: list[BaseProcess]) -> Exception | None:
    """Return the cause of an error of torch's loader in words, or None if they say it already."""
    text = str(error)
    if "Too many open files" in text or "ancdata" in text:
        return HandOverError(
            f"loader: too many open files ({text.splitlines()[0]}). "
            "Fix: ulimit -n 4096, or fewer pipeline.workers and pipeline.prefetch"
        )
    if isinstance(error, StorageFault):
        # Without the worker's traceback, which torch puts before it.
        return StorageFault(text.rsplit("StorageFault: ", 1)[-1].strip())
    # An error raised inside a worker contains "in DataLoader worker process".
    if "in DataLoader worker process" in text:
        return None
    # torch raises RuntimeError for a dead worker; the others come from a batch in transit when the worker died.
    in_transit = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    if not (in_transit or "DataLoader worker" in text):
        return None
    which = f"pid {_ended(workers)}, {text}" if in_transit else text
    # A signal is negative. 1 and 255: an exception, of Python or of a library, for example at the start.
    if any((worker.exitcode or 0) > 0 for worker in workers):
        return WorkerLostError(
            f"a decoding worker process ended with an error of its own: {which}. Fix: see its message above; if it could not "
            "start a thread or get memory, ulimit -u unlimited, more memory for the job, or fewer pipeline.workers"
        )
    cause = "The kernel does so when memory runs out: see dmesg. Fix: fewer pipeline.workers, or a smaller pipeline.prefetch"
    if any(worker.exitcode == -signal.SIGBUS for worker in workers):
        cause = (
            "A bus error means that shared memory (/dev/shm) is full, or that a mapped file has shrunk. "
            "Fix: docker --shm-size=8g, or fewer pipeline.workers; or restore the manifest"
        )
    return WorkerLostError(f"a decoding worker process was killed: {which}. {cause}")


def _ended(workers: list[BaseProcess]) -> str:
    """Name the pids of the workers that ended. Waits a little: a connection may close just before its process ends."""
    multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=5)
    return " and ".join(str(worker.pid) for worker in workers if not worker.is_alive()) or "unknown"


def _identity(batch: _Batch) -> _Batch:
    return batch


def _prepare_worker(worker: int) -> None:
    """Make a worker ignore stop signals and end with the training process, even if that process is killed.

    A message that it cannot print does not end it either.
    """
    # torch installs a handler of its own for one of the signals.
    for number in stop_signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    ignore_write_errors()
    exit_with_parent()

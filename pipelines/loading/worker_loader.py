"""Load batches in worker processes, in a given order, for torch on any device."""

import atexit
import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from runtime.child_processes import exit_with_parent


class WorkerLostError(RuntimeError):
    """A loader's worker process was killed."""


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def start_worker_server() -> None:
    """Start the fork server of the loader workers; call it before this process initializes MPI, Horovod or CUDA.

    The server imports what workers need, once. It ignores STOP_SIGNALS, which reach every process of a terminal (Ctrl-C) or
    of a Slurm step: the training process decides when workers end.
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
    """Kill all workers. At exit multiprocessing sends SIGTERM, which workers ignore, and joins: it would hang."""
    for child in multiprocessing.active_children():
        child.kill()


_Batch = TypeVar("_Batch")


class ClipLoader(Generic[_Batch]):
    """Yields `dataset[index]` for each batch index, in order, decoded ahead by `workers` processes (0: by this process).

    Each worker imports the program that uses the loader again, as `__mp_main__`: keep the program's imports and work under
    its `if __name__ == "__main__"`.
    """

    def __init__(self, dataset: Dataset[_Batch], workers: int, prefetch: int, pin_memory: bool = False) -> None:
        self._dataset = dataset
        self._options: dict[str, Any] = {"batch_size": None, "collate_fn": _identity, "pin_memory": pin_memory}
        if workers > 0:
            self._options |= {
                "num_workers": workers,
                "prefetch_factor": prefetch,
                "multiprocessing_context": "forkserver",
                "worker_init_fn": _prepare_worker,
            }

    def batches(self, batch_indices: Iterable[Any]) -> Iterator[_Batch]:
        """Load one batch per index; worker processes live until the iterator is exhausted or dropped.

        Raises WorkerLostError within seconds of a worker's death.
        """
        batches = iter(DataLoader(self._dataset, sampler=batch_indices, **self._options))  # type: ignore[arg-type]
        try:
            yield from batches
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # torch raises RuntimeError for a dead worker; the others come from a batch in transit when the worker died.
            # An error raised inside a worker contains "in DataLoader worker process".
            in_transit = not isinstance(error, RuntimeError) and self._options.get("num_workers", 0) > 0
            if "in DataLoader worker process" in str(error) or not (in_transit or "DataLoader worker" in str(error)):
                raise
            which = f"pid {_ended(batches._workers)}, {error}" if in_transit else str(error)  # type: ignore[attr-defined]
            raise WorkerLostError(
                f"a decoding worker process was killed: {which}. The kernel does so when memory runs out: "
                "see dmesg. Fix: fewer pipeline.workers, or a smaller pipeline.prefetch"
            ) from error
        finally:
            if "num_workers" in self._options:
                # An error's traceback keeps torch's iterator in a reference cycle, which would delay the workers' end.
                batches._shutdown_workers()  # type: ignore[attr-defined]


def _ended(workers: list[BaseProcess]) -> str:
    """Name the pids of the workers that ended. Waits a little: a connection may close just before its process ends."""
    multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=5)
    return " and ".join(str(worker.pid) for worker in workers if not worker.is_alive()) or "unknown"


def _identity(batch: _Batch) -> _Batch:
    return batch


def _prepare_worker(worker: int) -> None:
    """Make a worker ignore STOP_SIGNALS and end with the training process, even if that process is killed."""
    # torch installs a handler of its own for one of the signals.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    exit_with_parent()

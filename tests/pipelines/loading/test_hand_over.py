"""Hand over batches where shared memory is short, where files may not be opened, and where a batch cannot be pickled at all."""

import os
import pickle
import signal
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from pipelines.loading import hand_over
from pipelines.loading.worker_loader import ClipLoader, HandOverError, WorkerLostError, _explain, start_worker_server

ROOT = Path(__file__).resolve().parents[3]


def received(batch: Any) -> hand_over.Delivery:
    """Pickle as the worker's background thread does, and unpickle as the training process does."""
    delivery = pickle.loads(ForkingPickler.dumps(hand_over.hand_over(batch)))
    assert isinstance(delivery, hand_over.Delivery)
    return delivery


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Size and free bytes of shared memory, for a worker that has not given up on it."""
    sizes = {"total": 64 << 20, "free": 64 << 20}
    monkeypatch.setattr(hand_over, "shared_memory_bytes", lambda: (sizes["total"], sizes["free"]))
    monkeypatch.setattr(hand_over, "_withdrawn", "")
    return sizes


def test_half_of_a_small_shared_memory_and_a_gibibyte_of_a_large_one_stay_free(free: dict[str, int]) -> None:
    batch = torch.arange(1000)
    for total, left, through_pipe in (
        (64 << 20, 32 << 20, False),
        (64 << 20, (32 << 20) - 1, True),
        (64 << 30, 1 << 30, False),
        (64 << 30, (1 << 30) - 1, True),
    ):
        free["total"], free["free"] = total, left
        delivery = received(batch)
        assert bool(delivery.pipe_reason) == through_pipe, (total, left)
        assert torch.equal(delivery.batch, batch)
        assert delivery.batch.is_shared() != through_pipe


def test_after_a_failure_a_worker_does_not_try_shared_memory_again(
    free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(batch: Any) -> bytes:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    with monkeypatch.context() as patched:
        patched.setattr(hand_over.ForkingPickler, "dumps", full)
        handed_over = hand_over.hand_over(torch.ones(3))
    first, second = pickle.loads(pickle.dumps(handed_over)), received(torch.ones(3))
    assert "No space left" in first.pipe_reason and first.pipe_reason == second.pipe_reason
    assert torch.equal(first.batch, torch.ones(3)) and not second.batch.is_shared()


@pytest.mark.parametrize(
    ("error", "exit_codes", "expected", "words"),
    [
        (RuntimeError("Too many open files. Communication with the workers is"), [None], HandOverError, "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), [None], HandOverError, "ulimit -n"),
        (OSError(24, "Too many open files"), [None], HandOverError, "ulimit -n"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited"), [-signal.SIGBUS], WorkerLostError, "/dev/shm"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited"), [-signal.SIGKILL], WorkerLostError, "memory runs out"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited"), [None, 1], WorkerLostError, "see its message above"),
        (RuntimeError("Caught KeyError in DataLoader worker process 0."), [None], None, ""),
        (OSError(5, "Input/output error"), [None], None, ""),
    ],
)
def test_errors_of_the_loader_are_told_apart(
    error: Exception, exit_codes: list[int | None], expected: type[Exception] | None, words: str
) -> None:
    workers: Any = [SimpleNamespace(exitcode=code) for code in exit_codes]
    explained = _explain(error, workers)
    assert explained is None if expected is None else isinstance(explained, expected)
    assert words in str(explained) and (expected is None or "Fix: " in str(explained))


class Unpicklable(Dataset[Any]):
    def __getitem__(self, item: int) -> Any:
        return lambda: item


@pytest.mark.slow
def test_a_batch_that_cannot_be_pickled_is_an_error_with_its_cause() -> None:
    """torch's own thread would print the cause, and the training process would wait forever."""
    start_worker_server()
    with pytest.raises(
        RuntimeError, match=r"could not hand over a batch:(.|\n)*Unpicklable.__getitem__.<locals>.<lambda>"
    ):
        list(ClipLoader(Unpicklable(), 1, 2).batches([0, 1]))


PROGRAM = """
import torch

from pipelines.loading.worker_loader import ClipLoader, start_worker_server


class Batches:
    def __getitem__(self, item):
        return torch.full((1 << 18,), item), torch.tensor([item])


if __name__ == "__main__":
    start_worker_server()
    for large, small in ClipLoader(Batches(), 1, 2, warn=lambda text: print("warned:", text)).batches(range(5)):
        print(int(large.sum()), int(small))
"""


@pytest.mark.slow
def test_little_shared_memory_costs_time_and_no_batch(tmp_path: Path) -> None:
    """Load batches of 2 MiB through a /dev/shm of 256 KiB, as a container with too little has it."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    shell = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", shell, "sh", sys.executable, str(program)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    warned, *sums = done.stdout.splitlines()
    assert "No space left on device" in warned and "shared memory" in warned and "Fix: " in warned, done.stderr
    assert sums == [f"{item << 18} {item}" for item in range(5)]

"""Asynchronous checkpoint writes: the snapshot of a save, when a save waits, and the reported result."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distributed.checkpoint import writer as checkpoint_writer
from distributed.checkpoint.host_snapshot import HostSnapshot
from distributed.checkpoint.store import Checkpoint, CheckpointError, load_newest
from distributed.checkpoint.writer import CheckpointWriter

from .test_checkpoint import check_equal, checkpoint, names_in

# --- The snapshot -----------------------------------------------------------------------------------------------------


def tensors_of_all_kinds() -> dict[str, Tensor]:
    dtypes = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
    odd = {f"odd.{dtype}": torch.arange(5).to(dtype) for dtype in dtypes}
    return odd | {
        "scalar": torch.tensor(3),
        "none": torch.zeros(0, 4),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "view": torch.randn(6, 6)[::2, 1:],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        'name "with" \\ all é': torch.ones(1),
    }


@pytest.mark.parametrize("tensors", [tensors_of_all_kinds(), {}], ids=["all", "none"])
def test_a_copy_is_a_safetensors_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    copy = HostSnapshot()
    copy.take(tensors)
    file = tmp_path / "file.safetensors"
    file.write_bytes(b"".join(copy.parts()))
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].equal(tensor.detach()), name


def test_the_memory_of_a_copy_is_used_again(tmp_path: Path) -> None:
    copy = HostSnapshot()
    copy.take({"a": torch.ones(1000)})
    first = copy.parts()[1]
    copy.take({"a": torch.full((1000,), 2.0)})
    assert first.tobytes() == torch.full((1000,), 2.0).numpy().tobytes()
    # A changed layout gets memory of its own.
    copy.take({"a": torch.zeros(7)})
    assert len(copy.parts()[1]) == 28 and first.tobytes() == torch.full((1000,), 2.0).numpy().tobytes()


# --- The writer -------------------------------------------------------------------------------------------------------


class Gate:
    """Blocks writes until the test releases them; `fails` maps a step to the exception that its write raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.let_through, self.fails = (
            threading.Semaphore(0),
            threading.Semaphore(0),
            dict[int, Exception](),
        )
        real = checkpoint_writer.write_snapshot

        def write(folder: Path, snapshot: Any, *others: Any) -> Path:
            self.begun.release()
            assert self.let_through.acquire(timeout=30)
            if snapshot.step in self.fails:
                raise self.fails[snapshot.step]
            return real(folder, snapshot, *others)

        monkeypatch.setattr(checkpoint_writer, "write_snapshot", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_a_save_returns_while_the_write_goes_on_and_keeps_what_the_tensors_were(tmp_path: Path, gate: Gate) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    weight = torch.ones(1000)
    writer.save(Checkpoint({"weight": weight}, {}, {"step": 5}))
    assert gate.begun.acquire(timeout=30)
    assert writer.ended() == [] and names_in(tmp_path) == []
    # Training overwrites the weights.
    weight.zero_()
    gate.let_through.release()
    writer.wait()
    (written,) = writer.ended()
    assert (written.step, written.failed) == (5, None)
    assert 0 <= written.waited_s <= written.stall_s <= written.duration_s
    assert writer.ended() == []
    check_equal(load_newest(tmp_path)[0], Checkpoint({"weight": torch.ones(1000)}, {}, {"step": 5}))


def test_a_save_waits_for_the_write_before_and_says_so(tmp_path: Path, gate: Gate) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    first, second = checkpoint(1), checkpoint(2)
    writer.save(first)
    threading.Timer(0.3, gate.let_through.release, [2]).start()
    writer.save(second)
    assert "step-00000001" in names_in(tmp_path)
    writer.wait()
    one, two = writer.ended()
    assert (one.step, two.step) == (1, 2)
    assert one.waited_s < 0.1 < 0.2 < two.waited_s <= two.stall_s
    check_equal(load_newest(tmp_path)[0], second)


def test_a_write_that_fails_is_told_and_the_next_one_is_tried(tmp_path: Path, gate: Gate) -> None:
    gate.fails[1] = CheckpointError("no space left")
    gate.let_through.release(2)
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(checkpoint(1))
    saved = checkpoint(2)
    writer.save(saved)
    writer.wait()
    assert [(written.step, written.failed) for written in writer.ended()] == [(1, "no space left"), (2, None)]
    check_equal(load_newest(tmp_path)[0], saved)


def test_a_fault_of_the_program_is_not_taken_for_a_full_disk(tmp_path: Path, gate: Gate) -> None:
    gate.fails[1] = TypeError("a mistake")
    gate.let_through.release()
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(checkpoint(1))
    writer.wait()
    with pytest.raises(TypeError, match="a mistake"):
        writer.ended()


def test_waiting_has_a_limit(tmp_path: Path, gate: Gate) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(checkpoint(1))
    writer.wait(0.05)
    assert writer.ended() == []
    gate.let_through.release()
    writer.wait()
    assert len(writer.ended()) == 1

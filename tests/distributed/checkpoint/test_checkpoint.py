"""Checkpoints: round trip, damaged files, a full disk, and loading without executing code."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distributed.checkpoint.store import (
    Checkpoint,
    CheckpointError,
    Snapshot,
    load_checkpoint,
    load_newest,
    write_snapshot,
)
from tests.helpers.small_disk import mounted

FILES = ("network.safetensors", "optimizer.safetensors", "state.json", "sha256.json")


def checkpoint(step: int, numbers: int = 6) -> Checkpoint:
    """Checkpoint with every kind of tensor that a run has; the values encode the step."""
    network = {
        "conv.weight": torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last) + step,
        "bn.running_mean": torch.full((numbers,), float(step), dtype=torch.float64),
        "bn.num_batches_tracked": torch.tensor(step),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    optimizer = {"conv.weight.momentum_buffer": torch.randn(2, 3, 2, 2)}
    return Checkpoint(network, optimizer, {"step": step, "best_top1_percent": 12.5, "recipe": {"seed": 0}})


def save_checkpoint(folder: Path, saved: Checkpoint, keep: int, best: bool = False) -> Path:
    """Write a checkpoint as the writer thread does, but synchronously."""
    return write_snapshot(folder, Snapshot().take(saved), keep, best)


def check_equal(loaded: Checkpoint | None, saved: Checkpoint) -> None:
    assert loaded is not None
    assert loaded.state == saved.state
    for ours, theirs in ((loaded.network, saved.network), (loaded.optimizer, saved.optimizer)):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Round trip -------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    saved = checkpoint(7)
    path = save_checkpoint(tmp_path, saved, keep=2)
    assert path == tmp_path / "step-00000007"
    check_equal(load_checkpoint(path), saved)


def test_parameters_of_a_network_can_be_saved_as_they_are(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)
    state = network.state_dict(keep_vars=True)
    path = save_checkpoint(tmp_path, Checkpoint(state, {}, {"step": 0}), keep=1)
    assert torch.equal(load_checkpoint(path).network["weight"], network.weight.detach())


def test_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save_checkpoint(tmp_path, checkpoint(step), keep=5)
    loaded, broken = load_newest(tmp_path)
    assert loaded is not None
    assert (loaded.state["step"], broken) == (100, [])


@pytest.mark.parametrize("name", ["", "nothing"])
def test_nothing_to_load(tmp_path: Path, name: str) -> None:
    assert load_newest(tmp_path / name) == (None, [])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, checkpoint(step), keep)
    assert names_in(tmp_path) == [f"step-{step:08d}" for step in range(6 - keep, 6)]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(3), keep=2)
    again = checkpoint(3)
    save_checkpoint(tmp_path, again, keep=2)
    check_equal(load_newest(tmp_path)[0], again)


# --- The best checkpoint ----------------------------------------------------------------------------------------------


def test_the_best_is_kept_beside_the_newest_and_found_by_a_link(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_checkpoint(tmp_path, checkpoint(step), keep=2, best=step in (1, 3))
    assert names_in(tmp_path) == ["best", "step-00000003", "step-00000005", "step-00000006"]
    assert load_checkpoint(tmp_path / "best").state["step"] == 3
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert load_checkpoint(moved / "best").state["step"] == 3


def test_the_best_may_be_among_the_newest(tmp_path: Path) -> None:
    for step in range(1, 5):
        save_checkpoint(tmp_path, checkpoint(step), keep=1, best=step == 4)
    assert names_in(tmp_path) == ["best", "step-00000004"]


# --- Damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, where: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 0xFF
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, empty, delete])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_reported(tmp_path: Path, damage: Any, name: str) -> None:
    previous = checkpoint(10)
    save_checkpoint(tmp_path, previous, keep=3)
    newest = save_checkpoint(tmp_path, checkpoint(20), keep=3)
    damage(newest / name)
    loaded, broken = load_newest(tmp_path)
    check_equal(loaded, previous)
    assert len(broken) == 1
    assert str(newest) in broken[0]


@pytest.mark.parametrize("name", FILES)
@given(where=st.floats(0, 1, exclude_max=True))
@settings(max_examples=15)
def test_a_flipped_byte_anywhere_is_noticed(tmp_path_factory: pytest.TempPathFactory, name: str, where: float) -> None:
    path = save_checkpoint(tmp_path_factory.mktemp("run"), checkpoint(1), keep=1)
    flip(path / name, where)
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_checkpoint(path)


def test_all_damaged_is_none_and_a_line_for_each(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        flip(save_checkpoint(tmp_path, checkpoint(step), keep=3) / "network.safetensors")
    loaded, broken = load_newest(tmp_path)
    assert loaded is None
    assert [f"step-0000000{step}" in line for step, line in zip((3, 2, 1), broken, strict=True)] == [True] * 3


def test_the_damaged_file_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    flip(path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors.*checksum"):
        load_checkpoint(path)


def test_a_run_that_went_back_behind_broken_ones_keeps_what_it_saves(tmp_path: Path) -> None:
    """Damaged checkpoints of later steps do not push out a new checkpoint of an earlier step."""
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, checkpoint(step), keep=3)
    for step in (20, 30):
        flip(tmp_path / f"step-000000{step}" / "network.safetensors")
    saved = checkpoint(15)
    save_checkpoint(tmp_path, saved, keep=1)
    check_equal(load_newest(tmp_path)[0], saved)
    save_checkpoint(tmp_path, checkpoint(31), keep=1)
    assert names_in(tmp_path) == ["step-00000031"]


def test_a_file_in_the_place_of_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    (tmp_path / "step-00000002").write_text("not a folder")
    loaded, broken = load_newest(tmp_path)
    check_equal_step = loaded.state["step"] if loaded else None
    assert (check_equal_step, len(broken)) == (1, 1)


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    others = ["best", "step-1", "step-00000009.old"]
    for name in others:
        (tmp_path / name).mkdir()
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step), keep=1)
    assert names_in(tmp_path) == sorted([*others, "step-00000002"])


# --- Interrupted and refused writes -----------------------------------------------------------------------------------


def test_a_part_left_over_is_not_loaded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.part")
    loaded, broken = load_newest(tmp_path)
    assert loaded is not None
    assert (loaded.state["step"], broken) == (1, [])


def test_a_part_left_over_does_not_get_into_the_next_checkpoint(tmp_path: Path) -> None:
    part = tmp_path / ".step-00000002.part"
    part.mkdir()
    (part / "rubbish").write_text("from a run that was killed")
    saved = checkpoint(2)
    path = save_checkpoint(tmp_path, saved, keep=2)
    check_equal(load_newest(tmp_path)[0], saved)
    assert names_in(path) == sorted(FILES)


def test_a_part_of_another_step_does_not_stay_for_ever(tmp_path: Path) -> None:
    """Remove the files of killed writes, so that kills do not leak disk space."""
    part = tmp_path / ".step-00000001.part"
    part.mkdir()
    (part / "network.safetensors").write_bytes(b"cut short")
    save_checkpoint(tmp_path, checkpoint(2), keep=2)
    assert names_in(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("successor", ["none", "broken"])
def test_one_that_stepped_aside_for_a_successor_that_never_came_counts(tmp_path: Path, successor: str) -> None:
    """A kill between the two renames leaves only the `.replaced.part` folder, which still loads."""
    saved = checkpoint(3)
    path = save_checkpoint(tmp_path, saved, keep=1)
    path.rename(tmp_path / ".step-00000003.replaced.part")
    if successor == "broken":
        path.mkdir()
    check_equal(load_newest(tmp_path)[0], saved)
    save_checkpoint(tmp_path, checkpoint(4), keep=2)
    if successor == "none":
        check_equal(load_checkpoint(path), saved)


def test_a_failure_before_the_rename_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    previous = checkpoint(1)
    save_checkpoint(tmp_path, previous, keep=1)

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*step-00000002.*Input/output error"):
        save_checkpoint(tmp_path, checkpoint(2), keep=1)
    loaded, broken = load_newest(tmp_path)
    check_equal(loaded, previous)
    assert broken == []


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync first, because a power loss could otherwise leave a name without its content."""
    synced: list[str] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    assert sorted(synced[:-2]) == sorted(FILES)
    # First the names in the checkpoint's folder, then the name of that folder.
    assert synced[-2:] == [f".{path.name}.part", path.parent.name]


def test_a_folder_that_is_gone_is_an_error_and_not_made_again(tmp_path: Path) -> None:
    """The file system may be unmounted. Do not create the folder again; once it is mounted, the next save succeeds."""
    folder = tmp_path / "checkpoints"
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoints/step-00000001.*No such file"):
        save_checkpoint(folder, checkpoint(1), keep=1)
    assert names_in(tmp_path) == []
    folder.mkdir()
    saved = checkpoint(2)
    save_checkpoint(folder, saved, keep=1)
    check_equal(load_newest(folder)[0], saved)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """File system of 1 MiB."""
    with mounted(tmp_path / "disk", "1m") as disk:
        yield disk


def test_a_full_disk_is_an_error_and_leaves_the_earlier_one(small_disk: Path) -> None:
    # 0.4 MB
    previous = checkpoint(1, numbers=50_000)
    save_checkpoint(small_disk, previous, keep=1)
    with pytest.raises(CheckpointError, match=r"cannot write .*step-00000002.*(space|os error 28)"):
        save_checkpoint(small_disk, checkpoint(2, numbers=100_000), keep=1)
    loaded, broken = load_newest(small_disk)
    check_equal(loaded, previous)
    assert broken == []


def test_after_a_full_disk_a_checkpoint_that_fits_is_written(small_disk: Path) -> None:
    # 0.6 MB
    half = torch.zeros(75_000, dtype=torch.float64)
    with pytest.raises(CheckpointError):
        save_checkpoint(small_disk, Checkpoint({"half": half}, {"half": half}, {"step": 1}), keep=1)
    # This fits only if the failed attempt left no files.
    saved = checkpoint(2, numbers=75_000)
    save_checkpoint(small_disk, saved, keep=1)
    check_equal(load_newest(small_disk)[0], saved)


# --- No code is executed ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    assert names_in(path) == sorted(FILES)
    for name in ("network.safetensors", "optimizer.safetensors"):
        content = (path / name).read_bytes()
        header_bytes = int.from_bytes(content[:8], "little")
        assert json.loads(content[8 : 8 + header_bytes])
    json.loads((path / "state.json").read_text())


class Bomb:
    """Object whose unpickling creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def write_torch(value: Any, path: Path) -> None:
    torch.save(value, path)


def write_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("write", [write_torch, write_pickle])
@pytest.mark.parametrize("name", FILES[:3])
def test_a_pickle_with_the_right_checksum_is_refused_unread(tmp_path: Path, write: Any, name: str) -> None:
    (tmp_path / "run").mkdir()
    path = save_checkpoint(tmp_path / "run", checkpoint(1), keep=1)
    mark = tmp_path / "executed"
    write({"weight": Bomb(mark)}, path / name)
    digests = json.loads((path / "sha256.json").read_text())
    digests[name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "sha256.json").write_text(json.dumps(digests))
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load_checkpoint(path)
    assert not mark.exists()


def test_the_checkpoint_shares_no_memory_with_the_network(tmp_path: Path) -> None:
    weight: Tensor = torch.ones(3)
    path = save_checkpoint(tmp_path, Checkpoint({"weight": weight}, {}, {"step": 1}), keep=1)
    weight.zero_()
    assert load_checkpoint(path).network["weight"].tolist() == [1, 1, 1]

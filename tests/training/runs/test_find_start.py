"""Find the start of a run whose checkpoints are broken, or cannot be read: it never trains from step 0 without a word."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.checkpoint.store import Checkpoint, Snapshot, write_snapshot
from runtime.exit_codes import EXIT_REQUEUE
from training.config.schema import CheckpointConfig, ModelConfig
from training.errors import ConfigError, StorageError
from training.runs import resume
from training.runs.resume import find_start
from training.runs.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with checkpoints of steps 3 and 6."""
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    for step in (3, 6):
        state: dict[str, Any] = {"step": step, "recipe": {"model": {}}}
        write_snapshot(run.checkpoints, Snapshot().take(Checkpoint({"w": torch.ones(3)}, {}, state)), keep=2)
    return run


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between attempts, which then take no time."""
    slept: list[float] = []
    monkeypatch.setattr(resume.time, "sleep", slept.append)
    return slept


def step_of(folder: RunFolder, allow_restart: bool = False) -> int | None:
    checkpoint, _ = find_start(ModelConfig(), CheckpointConfig(allow_restart=allow_restart), folder)
    return None if checkpoint is None else checkpoint.state["step"]


def make_unreadable(folder: RunFolder, step: int) -> Callable[[], None]:
    """Let the kernel fail to read a checkpoint with EIO; returns a function that repairs it."""
    path = folder.checkpoints / f"step-{step:08d}" / "sha256.json"
    content = path.read_bytes()
    path.unlink()
    # Nothing is mapped at address 0, where a read of this file begins.
    path.symlink_to("/proc/self/mem")

    def repair() -> None:
        path.unlink()
        path.write_bytes(content)

    return repair


def damage(folder: RunFolder, step: int) -> None:
    path = folder.checkpoints / f"step-{step:08d}" / "network.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def test_the_newest_whole_checkpoint_is_taken(folder: RunFolder, waits: list[float]) -> None:
    assert step_of(folder) == 6
    damage(folder, 6)
    assert step_of(folder) == 3 and waits == []


def test_a_run_without_checkpoints_starts_at_step_0(tmp_path: Path) -> None:
    assert step_of(RunFolder(tmp_path / "new")) is None


def test_checkpoints_that_cannot_be_read_end_the_start_to_be_requeued(folder: RunFolder, waits: list[float]) -> None:
    for step in (3, 6):
        make_unreadable(folder, step)
    with pytest.raises(
        StorageError, match=r"cannot be read: Input/output error, tried 6 times\. Not starting at step 0"
    ):
        step_of(folder)
    assert StorageError.exit_code == EXIT_REQUEUE and waits == list(resume.READ_RETRIES_S)
    with pytest.raises(StorageError):
        step_of(folder, allow_restart=True)


def test_one_that_cannot_be_read_and_one_that_is_broken_is_no_broken_run(folder: RunFolder, waits: list[float]) -> None:
    damage(folder, 3)
    make_unreadable(folder, 6)
    with pytest.raises(StorageError):
        step_of(folder)


def test_a_file_system_that_comes_back_is_waited_for(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    repairs = [make_unreadable(folder, step) for step in (3, 6)]
    monkeypatch.setattr(resume.time, "sleep", lambda _: [repair() for repair in repairs])
    assert step_of(folder) == 6


def test_broken_checkpoints_are_not_replaced_unless_that_is_wanted(folder: RunFolder, waits: list[float]) -> None:
    for step in (3, 6):
        damage(folder, step)
    with pytest.raises(
        ConfigError, match=r"none of the 2 checkpoints .* is whole .*Fix: .*checkpoint\.allow_restart=true"
    ):
        step_of(folder)
    assert step_of(folder, allow_restart=True) is None and waits == []

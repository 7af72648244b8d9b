"""The last checkpoint of a run, on file systems that fail: written again, or to a second place, or given up in words."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distributed.checkpoint.store import Checkpoint, load_checkpoint, load_newest
from distributed.checkpoint.writer import CheckpointWriter
from tests.helpers.small_disk import make_read_only, mounted, resize
from training import last_checkpoint
from training.errors import StorageError
from training.last_checkpoint import LastCheckpoint, LastWrite, check_finished, retry_waits, wait_for_all


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_checkpoint, "RETRY_WAITS_S", (0.05,))
    monkeypatch.setattr(last_checkpoint, "_ROUND_S", 0.02)


class Run:
    """Rank 0 of a run whose last checkpoint, of step 7 and 2 MB, is written to `folder`."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.lines: list[str] = []
        self.sent: list[dict[str, Any]] = []
        self.progress: list[tuple[int, str]] = []
        self.stop_wanted = False
        config = SimpleNamespace(checkpoint=SimpleNamespace(**{"last_retry_s": 60.0, "second_place": None} | settings))
        backend = SimpleNamespace(topology=SimpleNamespace(host="n17"), broadcast_object=self._send)
        control = SimpleNamespace(progress=lambda *place: self.progress.append(place))
        run = SimpleNamespace(path=Path("outputs/x"), checkpoints=folder)
        self.job: Any = SimpleNamespace(config=config, backend=backend, control=control, folder=run)
        self.writer = CheckpointWriter(folder, keep=2)
        self.weight = torch.arange(250_000.0)

    def _send(self, value: Any) -> Any:
        self.sent.append(value)
        return value

    def _report(self) -> str | None:
        (written,) = self.writer.ended()
        return written.failed

    def finish(self, stopped: bool = False) -> LastWrite:
        self.writer.save(Checkpoint({"weight": self.weight}, {"momentum": self.weight}, {"step": 7}))
        last = LastCheckpoint(self.job, self.writer, self.lines.append, self._report)
        wanted = lambda: self.stop_wanted  # noqa: E731
        return wait_for_all(self.job, 6, last.updates(stopped, wanted), wanted)

    def check_whole(self, path: Path | str) -> None:
        checkpoint = load_checkpoint(Path(path))
        assert checkpoint.network["weight"].equal(self.weight) and checkpoint.state["step"] == 7


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "1m") as disk:
        yield disk


def soon(action: Any, *arguments: Any) -> None:
    threading.Timer(0.3, action, arguments).start()


def test_a_full_disk_that_gets_room_takes_it(disk: Path) -> None:
    run = Run(disk)
    soon(resize, disk, "8m")
    assert run.finish() == LastWrite(is_over=True)
    run.check_whole(disk / "step-00000007")
    assert [path.name for path in disk.iterdir()] == ["step-00000007"]
    assert run.lines[0] == "checkpoint: trying again in 0.05 s, for at most 60 s"
    assert run.lines[-1] == f"checkpoint: written in attempt {len(run.lines)}" and len(run.lines) > 2
    # The other ranks hear of each attempt, and none of them counts as hanging.
    assert sum(update["is_retrying"] for update in run.sent) == len(run.progress) >= len(run.lines) - 1
    assert set(run.progress) == {(6, "checkpoint")}


def test_a_read_only_folder_that_becomes_writable_takes_it(disk: Path) -> None:
    resize(disk, "8m")
    folder = disk / "checkpoints"
    folder.mkdir()
    make_read_only(folder)
    run = Run(folder)
    soon(make_read_only, folder, False)
    assert run.finish() == LastWrite(is_over=True)
    run.check_whole(folder / "step-00000007")


def test_a_folder_that_stays_full_leaves_it_in_a_new_private_folder(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = Run(disk, last_retry_s=0.2)
    last = run.finish()
    assert last.is_over and last.failed is not None and last.second_place is not None
    assert "No space left on device (" in last.failed and last.failed.endswith(" attempts)")
    run.check_whole(last.second_place)
    folder = Path(last.second_place).parent
    assert folder.parent == tmp_path and folder.name.startswith("tsm-x-") and folder.stat().st_mode & 0o777 == 0o700
    assert load_newest(disk) == (None, [])
    with pytest.raises(StorageError) as caught:
        check_finished(last, 7, disk)
    assert caught.value.exit_code == 75
    assert f"It is in {last.second_place} on n17. Fix: make room, or " in str(caught.value)
    assert f"cp -r {last.second_place} {disk}/ and start the run again" in str(caught.value)


def test_a_second_place_can_be_chosen(disk: Path, tmp_path: Path) -> None:
    run = Run(disk, last_retry_s=0.0, second_place=str(tmp_path / "other"))
    last = run.finish()
    assert last.second_place == str(tmp_path / "other/x/step-00000007")
    run.check_whole(last.second_place)
    assert last.failed is not None and last.failed.endswith("(1 attempts)")


def test_two_places_that_fail_are_both_named(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for second in (disk / "second", tmp_path / "file"):
        run = Run(disk, last_retry_s=0.0, second_place=str(second))
        last = run.finish()
        assert last.second_place is None and last.failed is not None
        assert last.failed.count("No space left") + last.failed.count("Not a directory") == 2
        with pytest.raises(StorageError, match=rf"; nor in a second place: .*{second}.*Fix: make room, or "):
            check_finished(last, 7, disk)


def test_after_a_stop_by_a_signal_it_is_tried_once_more(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_checkpoint, "_STOPPED_RETRY_S", 0.05)
    run = Run(disk)
    # All ranks still want to stop.
    run.stop_wanted = True
    last = run.finish(stopped=True)
    assert last.failed is not None and last.second_place is None
    assert run.lines == ["checkpoint: trying again in 0.05 s, for at most 0.05 s"]


def test_a_stop_signal_between_attempts_leads_to_the_second_place_at_once(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_checkpoint, "RETRY_WAITS_S", (600.0,))
    run = Run(disk, last_retry_s=3600.0, second_place=str(tmp_path))
    soon(setattr, run, "stop_wanted", True)
    last = run.finish()
    assert last.second_place is not None
    run.check_whole(last.second_place)


def test_a_slow_write_is_waited_for_in_rounds_that_are_no_progress(tmp_path: Path) -> None:
    """A write that hangs stays a hang, for the monitor to name."""
    run = Run(tmp_path)
    real = run.writer.wait

    def wait(limit_s: float | None = None) -> bool:
        if limit_s is not None and len(run.sent) < 3:
            return False
        return real(limit_s)

    run.writer.wait = wait  # type: ignore[method-assign]
    assert run.finish() == LastWrite(is_over=True)
    assert len(run.sent) >= 4 and run.progress == []


def test_the_waits_between_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    clock = [100.0]
    monkeypatch.setattr(last_checkpoint.time, "monotonic", lambda: clock[0])
    waits = []
    for wait_s in retry_waits(100.0):
        waits.append(wait_s)
        clock[0] += wait_s
    assert waits == [1, 2, 4, 8, 15, 30, 30, 10]
    assert list(retry_waits(0.0)) == []


def test_a_checkpoint_that_was_written_ends_a_run_well(tmp_path: Path) -> None:
    check_finished(LastWrite(is_over=True), 7, tmp_path)

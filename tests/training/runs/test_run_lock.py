"""One job at a time trains in a run folder: the second start is refused, and the lock of a job that is gone is taken over."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distributed.checkpoint.store import Checkpoint
from distributed.checkpoint.writer import CheckpointWriter
from runtime import lease
from runtime.lease import identity
from tests.training.config.test_config import compose, config_of
from training.errors import ConfigError
from training.planning import command
from training.planning.command import run_plan
from training.runs import run_lock
from training.runs.run_folder import RunFolder
from training.runs.run_lock import lock_run, run_locked

HOLDER = """
import sys, time
from pathlib import Path
from training.runs.run_folder import RunFolder
from training.runs.run_lock import lock_run
lock_run(RunFolder(Path(sys.argv[1])), "77")
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run folder; waiting for the end of another job, and watching one on another machine, take a fraction of a second."""
    monkeypatch.setattr(run_lock, "_ENDING_S", 0.1)
    monkeypatch.setattr(run_lock, "_POLL_S", 0.05)
    monkeypatch.setattr(lease, "STALE_AFTER_S", 0.5)
    monkeypatch.setattr(lease, "_RENEWED_EVERY_S", 0.05)
    monkeypatch.setattr(lease, "_POLL_S", 0.02)
    return RunFolder(tmp_path / "outputs/x")


def write_lock(folder: RunFolder, **fields: object) -> str:
    folder.path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**json.loads(identity()), "host": "n17", "pid": 4711, "job": "77", **fields})
    folder.lock.write_text(text)
    return text


def test_a_second_job_is_refused_until_the_first_has_ended(folder: RunFolder) -> None:
    release = lock_run(folder)
    with pytest.raises(ConfigError) as caught:
        lock_run(folder)
    assert str(caught.value).startswith(
        f"{folder.path} is in use by process {os.getpid()} on {os.uname().nodename} since 2"
    )
    assert str(caught.value).endswith(". Fix: wait for its end, stop it, or run_id=ANOTHER")
    release()
    assert not folder.path.exists(), "a start that wrote nothing leaves an empty folder"
    lock_run(folder)()


def test_the_lock_of_a_killed_job_is_taken_over_at_once(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER_S", 600.0)
    notes: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=rf"process {holder.pid} .*\(job 77\)\. Fix: .* scancel 77, or run_id="):
            lock_run(folder)
        holder.kill()
        holder.wait()
        release = lock_run(folder, note=notes.append)
    assert [note.split(" on ")[0] for note in notes] == [
        f"run folder: took over {folder.path} from process {holder.pid}"
    ]
    release()


def test_a_job_that_ends_a_moment_later_does_not_block(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_ENDING_S", 60.0)
    release = lock_run(folder)
    (folder.path / "something").touch()
    threading.Timer(0.3, release).start()
    lock_run(folder)()


def test_a_job_on_another_machine_that_is_silent_is_gone(folder: RunFolder) -> None:
    write_lock(folder, machine="another")
    notes: list[str] = []
    waited: list[None] = []
    began_s = time.monotonic()
    lock_run(folder, note=notes.append, waiting=lambda: waited.append(None))()
    assert time.monotonic() - began_s >= 0.5
    who = "process 4711 on n17"
    assert "was not released by " + who in notes[0] and "whether that process is alive" in notes[0]
    assert "took over" in notes[1] and who in notes[1] and len(notes) == 2
    assert len(waited) > 1


def test_a_job_on_another_machine_that_is_alive_holds_its_run(folder: RunFolder) -> None:
    text = write_lock(folder, machine="another")
    ended = threading.Event()
    threading.Thread(target=lease._renew, args=(folder.lock, text, ended), daemon=True).start()
    with pytest.raises(ConfigError, match=r"in use by process 4711 on n17 since .* \(job 77\)"):
        lock_run(folder)
    ended.set()
    assert folder.lock.read_text() == text


def test_a_job_learns_that_its_run_was_taken_over(folder: RunFolder) -> None:
    lost: list[str] = []
    release = lock_run(folder, lost=lost.append)
    text = write_lock(folder, machine="another")
    deadline_s = time.monotonic() + 60
    while not lost:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert lost[0].startswith("process 4711 on n17")
    release()
    assert folder.lock.read_text() == text


def test_a_lock_outlives_a_mount_that_goes_away_for_a_while(folder: RunFolder, tmp_path: Path) -> None:
    release = lock_run(folder)
    folder.path.rename(tmp_path / "away")
    time.sleep(0.2)
    (tmp_path / "away").rename(folder.path)
    before_ns = folder.lock.stat().st_mtime_ns
    deadline_s = time.monotonic() + 60
    while folder.lock.stat().st_mtime_ns == before_ns:
        assert time.monotonic() < deadline_s, "it is not renewed any more"
        time.sleep(0.02)
    release()


def test_a_folder_that_cannot_be_made_is_an_error_of_the_configuration(folder: RunFolder) -> None:
    folder.path.parent.write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot create the run folder .*: .*Fix: outputs=FOLDER"):
        lock_run(folder)


class OneOfTwoRanks:
    """A backend of which only rank and broadcast count: rank 0's objects arrive in `sent`."""

    def __init__(self, rank: int, sent: list[Any]) -> None:
        self.topology, self._sent = SimpleNamespace(rank=rank, job_id=None), sent

    def broadcast_object(self, value: Any) -> Any:
        if self.topology.rank == 0:
            self._sent.append(value)
        return self._sent[-1]


def test_every_rank_says_who_holds_the_run(folder: RunFolder) -> None:
    release = lock_run(folder)
    sent: list[Any] = []
    control: Any = SimpleNamespace(log=SimpleNamespace(info=print), progress=lambda *_: None, at_exit=None)
    for rank in (0, 1):
        backend: Any = OneOfTwoRanks(rank, sent)
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"), run_locked(folder, backend, control):
            pytest.fail("not refused")
    release()
    backend = OneOfTwoRanks(0, sent)
    with run_locked(folder, backend, control):
        assert folder.lock.exists() and sent[-1] is None
        # A process that ends through the control channel leaves no lock either.
        control.at_exit()
        assert not folder.lock.exists()


class Aborted(Exception):
    """Stands for the end of the process."""


def test_a_job_that_lost_its_run_writes_no_checkpoint_more(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a suspension: the thread that renews the lock has not run yet, and the checkpoint may be half written."""
    monkeypatch.setattr(lease, "_RENEWED_EVERY_S", 600.0)

    def abort(message: str, code: int) -> None:
        assert code == 2 and message.startswith(f"{folder.path} was taken over by process 4711 on n17")
        raise Aborted

    control: Any = SimpleNamespace(log=SimpleNamespace(info=print), progress=lambda *_: None, abort=abort)
    backend: Any = OneOfTwoRanks(0, [])
    with run_locked(folder, backend, control):
        folder.checkpoints.mkdir()
        checks = []

        def check() -> None:
            checks.append(sorted(path.name for path in folder.checkpoints.iterdir()))
            if len(checks) == 4:
                write_lock(folder, machine="another")
            control.check_run_lock()

        writer = CheckpointWriter(folder.checkpoints, keep=1, check=check)
        for step in (1, 2, 3):
            writer.save(Checkpoint({}, {}, {"step": step}))
            writer.wait()
            if step == 1:
                (written,) = writer.ended()
                assert written.failed is None
            else:
                with pytest.raises(Aborted):
                    writer.ended()
        found = sorted(path.name for path in folder.checkpoints.iterdir())
        assert found == ["step-00000001", ".step-00000002.part"][::-1]
        assert checks[3:] == [found, found]


def test_plan_does_not_replace_the_configuration_of_a_run_in_use(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["experiment=smoke", f"outputs={folder.path.parent}", "run_id=x", "plan.write_config=true"]
    release = lock_run(folder)
    folder.write_config(config_of(*overrides, "seed=1"))
    # Without data there would be no plan to write.
    plan = SimpleNamespace(
        config=config_of(*overrides, "seed=2"), problems=[], warnings=[], exit_code=0, recipe=None, complete=False
    )
    monkeypatch.setattr(command, "make_plan", lambda config: plan)
    monkeypatch.setattr(command, "as_text", lambda plan: "")
    assert run_plan(lambda: compose(*overrides)) == 2
    assert f"error (plan): {folder.path} is in use by process {os.getpid()}" in capsys.readouterr().err
    assert "seed: 1" in folder.config.read_text()
    release()
    assert run_plan(lambda: compose(*overrides)) == 0
    assert "seed: 2" in folder.config.read_text() and not folder.lock.exists()

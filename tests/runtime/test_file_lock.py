"""Test locks: by flock(2), and by lease files where flock does not work."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import lease
from runtime.file_lock import LockHeld, file_lock, hold, lease_path
from runtime.lease import identity, take_lease
from tests.helpers.flock import break_flock

# A child process with the same kind of locks as the test, which runs `body` with `path` and prints what it prints.
CHILD = """
import errno, fcntl, os, sys, time
from pathlib import Path
from runtime.file_lock import LockHeld, file_lock, hold
path, kind = Path(sys.argv[1]), sys.argv[2]
def no_flock(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
if kind == "lease":
    fcntl.flock = no_flock
"""


@pytest.fixture(params=["flock", "lease"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Locks of a file system with flock, and of one without; watching a holder takes 0.4 s instead of a minute."""
    monkeypatch.setattr(lease, "_RENEWED_EVERY_S", 0.1)
    monkeypatch.setattr(lease, "STALE_AFTER_S", 0.4)
    monkeypatch.setattr(lease, "_POLL_S", 0.02)
    if request.param == "lease":
        break_flock(monkeypatch)
    return request.param


def start(path: Path, kind: str, body: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD + body, str(path), kind]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("what", ["new file", "file", "folder"])
def test_one_holder_at_a_time(kind: str, what: str, tmp_path: Path) -> None:
    path = tmp_path if what == "folder" else tmp_path / "lock"
    if what == "file":
        path.write_text("kept")
    with file_lock(path) as held:
        assert held
        with file_lock(path, wait=False) as again:
            assert not again
        got = threading.Event()

        def wait() -> None:
            with file_lock(path):
                got.set()

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        assert not got.wait(0.2)
    assert got.wait(10)
    waiting.join(10)
    if what == "file":
        assert path.read_text() == "kept"
    assert not lease_path(path).exists()


def test_a_held_lock_names_its_holder_and_is_free_after_its_release(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path) as held:
        with pytest.raises(LockHeld) as caught:
            hold(path)
        assert f"process {os.getpid()} on {os.uname().nodename} since 20" in caught.value.holder
        held.release()
        again = hold(path)
    # The end of the first hold's block does not release the second.
    with pytest.raises(LockHeld):
        hold(path)
    again.release()
    hold(path).release()


def test_the_lock_of_a_killed_process_is_free(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with start(path, kind, "kept = hold(path); print('held', flush=True); time.sleep(60)") as process:
        assert line_of(process) == "held"
        with pytest.raises(LockHeld, match=f"process {process.pid} on "):
            hold(path)
        process.kill()
        # Dead, although this process has not collected its exit status yet.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        began_s = time.monotonic()
        with hold(path), pytest.raises(LockHeld, match=f"process {os.getpid()} on "):
            hold(path)
        # Known from its pid, not by watching.
        assert kind == "flock" or time.monotonic() - began_s < lease.STALE_AFTER_S
        process.wait()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_file_systems_without_flock(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_flock(monkeypatch, number)
    with hold(tmp_path / "lock"):
        assert lease_path(tmp_path / "lock").exists()


def test_other_errors_of_flock_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_flock(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        hold(tmp_path / "lock")


# --- Leases -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a lease; watching a holder takes 0.4 s instead of a minute."""
    monkeypatch.setattr(lease, "_RENEWED_EVERY_S", 0.05)
    monkeypatch.setattr(lease, "STALE_AFTER_S", 0.4)
    monkeypatch.setattr(lease, "_POLL_S", 0.02)
    return tmp_path / "lock.lease"


def of_another_machine(**fields: object) -> str:
    return json.dumps({**json.loads(identity()), "machine": "another", "host": "n17", **fields})


@pytest.mark.parametrize("text", [of_another_machine(), "", '{"pid": 7', "[]"])
def test_a_lease_that_nobody_renews_is_stale(quick_lease: Path, text: str) -> None:
    quick_lease.write_text(text)
    began_s = time.monotonic()
    release = take_lease(quick_lease)
    assert time.monotonic() - began_s >= 0.4
    assert json.loads(quick_lease.read_text())["pid"] == os.getpid()
    release()
    assert not quick_lease.exists()


def test_the_lease_of_a_pid_that_is_used_again_is_stale(quick_lease: Path) -> None:
    quick_lease.write_text(json.dumps({**json.loads(identity()), "started": 1}))
    take_lease(quick_lease)()


def test_a_lease_that_another_machine_renews_is_held(quick_lease: Path) -> None:
    release = take_lease(quick_lease)
    text = of_another_machine(pid=4711)
    # The thread of the first lease renews only its own.
    quick_lease.write_text(text)
    ended = threading.Event()
    threading.Thread(target=lease._renew, args=(quick_lease, text, ended), daemon=True).start()
    with pytest.raises(LockHeld) as caught:
        take_lease(quick_lease)
    assert caught.value.holder.startswith("process 4711 on n17 since ")
    # A holder that lost its lease leaves the file to the next.
    release()
    assert quick_lease.read_text() == text
    ended.set()


def test_one_of_many_takes_over_a_stale_lease(quick_lease: Path) -> None:
    """Let threads race for stale leases, also for one whose first taker died while taking it over."""
    for race in range(10):
        quick_lease.write_text(json.dumps({**json.loads(identity()), "started": race}))
        if race % 2:
            stale = json.dumps({**json.loads(identity()), "started": 1})
            quick_lease.with_name("lock.lease.takeover").write_text(stale)
        barrier = threading.Barrier(6)
        outcomes: list[Callable[[], None] | None] = []

        def take(barrier: threading.Barrier, outcomes: list) -> None:
            barrier.wait()
            try:
                outcomes.append(take_lease(quick_lease))
            except LockHeld:
                outcomes.append(None)

        threads = [threading.Thread(target=take, args=(barrier, outcomes)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (release,) = [outcome for outcome in outcomes if outcome is not None]
        assert len(outcomes) == 6
        release()
        assert list(quick_lease.parent.iterdir()) == []


def test_processes_race_for_a_stale_lease(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lease_path(path).write_text(json.dumps({**json.loads(identity()), "started": 1}))
    body = """
print("ready", flush=True)
sys.stdin.readline()
try:
    kept = hold(path)
    print("held", flush=True)
except LockHeld as error:
    print(error.holder, flush=True)
sys.stdin.read()
"""
    processes = [start(path, "lease", body) for _ in range(2)]
    try:
        assert [line_of(process) for process in processes] == ["ready", "ready"]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        # Neither ends before both have said.
        said = [line_of(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert said.count("held") == 1
    winner = processes[said.index("held")]
    assert f"process {winner.pid} on " in said[1 - said.index("held")]

"""Test runtime/: atomic writes, and children that end with their parent."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.atomic_write import TEMPORARY_SUFFIX, atomic_write, write_text


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_and_fail(path: Path) -> None:
    before = path.read_text()
    with atomic_write(path) as file:
        file.write(b"half of it")
        file.flush()
        assert path.read_text() == before
        raise ZeroDivisionError


def test_an_atomic_write_replaces_the_file_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("first", "second, longer"):
        write_text(path, text)
        assert path.read_text() == text
    with pytest.raises(ZeroDivisionError):
        write_and_fail(path)
    assert path.read_text() == "second, longer"
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_write_syncs_the_file_before_the_rename_and_the_folder_after(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_rename)
    write_text(tmp_path / "file", "text", durable)
    expected = [f"sync file{TEMPORARY_SUFFIX}", "rename", f"sync {tmp_path.name}"]
    assert calls == (expected if durable else ["rename"])


def test_a_left_over_temporary_file_does_not_disturb_the_next_write(tmp_path: Path) -> None:
    (tmp_path / f"file{TEMPORARY_SUFFIX}").write_text("longer than what comes next")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert names_in(tmp_path) == ["file"]


PARENT = """
import multiprocessing, time
from runtime.child_processes import exit_with_parent

def child(pipe):
    exit_with_parent()
    pipe.send(None)
    while True:
        pass

if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,), daemon=True)
    process.start()
    ours.recv()
    print(process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_busy_child_ends_with_a_killed_parent(method: str, tmp_path: Path) -> None:
    """End a busy child when its parent is killed, even a fork server's child.

    The fork server outlives the parent until its last worker has ended.
    """
    program = tmp_path / "program.py"
    program.write_text(PARENT.format(method=method))
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        waiter = os.pidfd_open(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert select.select([waiter], [], [], 20)[0], "the child still runs"
        os.close(waiter)

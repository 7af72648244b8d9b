"""Temporary folders of killed processes are removed; those in use, of others, or of unknown processes stay."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.leftovers import make_temporary_folder, remove_leftovers
from tests.helpers.worlds import CHECKOUT

HOLDER = """
import multiprocessing, sys, time
from runtime.leftovers import hold_socket_folder
hold_socket_folder()
lock = multiprocessing.get_context("forkserver").Lock()
print(multiprocessing.util.get_temp_dir(), flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@pytest.fixture
def holder(temporary: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLDER, "300"]
    # In a session of its own, so that its resource tracker can be killed too.
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    yield process
    kill(process)
    process.communicate()


def kill(process: "subprocess.Popen[str]") -> None:
    os.killpg(process.pid, 9)
    process.wait(60)


def folder_of(process: "subprocess.Popen[str]") -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def semaphores(folder: Path) -> list[Path]:
    return list(Path("/dev/shm").glob(f"sem.{folder.name}-*"))


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_stays(
    temporary: Path, holder: "subprocess.Popen[str]"
) -> None:
    folder = folder_of(holder)
    assert folder.parent == temporary
    remove_leftovers(temporary, "pymp-")
    assert folder.is_dir() and len(semaphores(folder)) == 1
    kill(holder)
    assert folder.is_dir() and len(semaphores(folder)) == 1
    remove_leftovers(temporary, "pymp-")
    assert not folder.exists() and semaphores(folder) == []


def test_a_process_that_ends_by_itself_leaves_nothing(temporary: Path) -> None:
    command = [sys.executable, "-c", HOLDER, "0"]
    shown = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    folder = Path(shown.stdout.strip())
    assert not folder.exists() and semaphores(folder) == [] and shown.stderr == ""


def test_a_folder_is_in_use_while_any_process_has_its_descriptor(temporary: Path) -> None:
    folder, descriptor = make_temporary_folder("tsm-test-")
    waiting = [sys.executable, "-c", "input()"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE, pass_fds=[descriptor]) as child:
        os.close(descriptor)
        remove_leftovers(temporary, "tsm-test-")
        assert folder.is_dir()
        child.kill()
    remove_leftovers(temporary, "tsm-test-")
    assert not folder.exists()


def test_folders_of_unknown_owners_and_links_stay(temporary: Path) -> None:
    (temporary / "pymp-unknown").mkdir()
    elsewhere, descriptor = make_temporary_folder("elsewhere-")
    os.close(descriptor)
    (temporary / "pymp-link").symlink_to(elsewhere)
    (temporary / "pymp-open").mkdir()
    (temporary / "pymp-open").chmod(0o777)
    (temporary / "pymp-open" / "owner").touch()
    remove_leftovers(temporary, "pymp-")
    assert {path.name for path in temporary.iterdir()} == {"pymp-unknown", "pymp-link", "pymp-open", elsewhere.name}
    assert (elsewhere / "owner").is_file()

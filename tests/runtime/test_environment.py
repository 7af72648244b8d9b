"""Repair or refuse what a process inherits: locale, temporary folder, user, home, limits. Each program starts in that state."""

import errno
import getpass
import multiprocessing.util
import os
import pwd
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import environment
from runtime.environment import EnvironmentFault, explain, repair
from tests.helpers.stranger import as_stranger, needs_root, shared_folder

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, folder: Path = ROOT, limits: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a program that has runtime on its path, after `limits`, a line of shell."""
    return subprocess.run(
        ["bash", "-c", f'{limits}\nexec "$@"', "bash", sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- The first call of an entry point ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}])
def test_text_in_any_locale(variables: dict[str, str], tmp_path: Path) -> None:
    """Print and read names that the locale's encoding does not have; children of the process can too."""
    (tmp_path / "Überschlag").write_text("手", encoding="utf-8")
    program = (
        "from runtime.environment import start_program; start_program()\n"
        "import pathlib, subprocess, sys\n"
        "(path,) = pathlib.Path('.').iterdir()\n"
        "print(path, path.read_text(), b'\\xff'.decode(errors='surrogateescape'), flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import sys; print(sys.flags.utf8_mode)'], check=True)\n"
    )
    # Without these two, Python itself would choose UTF-8 for the locale C.
    done = run(program, tmp_path, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", **variables)
    assert done.returncode == 0, done.stderr
    text, mode = done.stdout.splitlines()
    assert mode == "1"
    assert text == (r"\xdcberschlag \u624b \udcff" if len(variables) == 2 else r"Überschlag 手 \udcff")


def test_a_working_folder_that_was_deleted(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = run("from runtime.environment import start_program; start_program()", gone, limits="rmdir ../gone")
    assert done.returncode == 2
    assert "the working folder is gone" in done.stderr and "Fix: cd" in done.stderr and "Traceback" not in done.stderr


# --- Repairs ----------------------------------------------------------------------------------------------------------

LISTEN = (
    "import multiprocessing.connection, os, tempfile\n"
    "from runtime.environment import repair\n"
    "print(repair())\n"
    "address = multiprocessing.connection.Listener(family='AF_UNIX').address\n"
    "print(address, oct(os.stat(os.path.dirname(address)).st_mode), tempfile.gettempdir())\n"
)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder in /tmp: pytest's own may be longer than an address of a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


@pytest.mark.parametrize(("length", "fits"), [(75, True), (76, False), (200, False)])
def test_sockets_get_a_short_private_folder(length: int, fits: bool, short_path: Path) -> None:
    folder = short_path / ("x" * (length - len(f"{short_path}/")))
    folder.mkdir()
    done = run(LISTEN, TMPDIR=str(folder))
    assert done.returncode == 0, done.stderr
    notes, line = done.stdout.splitlines()
    address, mode, temporary = line.split()
    assert temporary == str(folder)
    assert address.startswith(str(folder)) == fits
    assert (notes == "[]") == fits and ("TMPDIR is too long" in notes) != fits
    assert stat.S_IMODE(int(mode, 8)) == 0o700
    # multiprocessing removes its folder at exit.
    assert not Path(address).parent.exists()


def test_no_short_folder_is_a_fault_that_names_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    # Replaced, because this process may have a folder for sockets already.
    monkeypatch.setattr(multiprocessing.util, "get_temp_dir", lambda: tempfile.mkdtemp())
    monkeypatch.setattr(environment, "_SHORT_FOLDERS", (str(tmp_path / "missing"),))
    monkeypatch.setenv("TMPDIR", str(folder))
    with pytest.raises(EnvironmentFault, match=r"TMPDIR has \d+ bytes.* Fix: TMPDIR=/tmp"):
        repair()
    assert tempfile.gettempdir() == str(folder)


def test_tmpdir_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/nonexistent/scratch")
    (note,) = repair()
    assert "TMPDIR=/nonexistent/scratch" in note and tempfile.gettempdir() in note
    assert os.environ["TMPDIR"] == tempfile.gettempdir()


def test_no_temporary_folder_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(EnvironmentFault, match="no temporary folder .*Fix: TMPDIR=FOLDER"):
        repair()


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without an entry in the password database, as in a container that was started with --user."""

    def missing(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", missing)
    # setenv first, so that what the repair sets is undone too.
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("nameless")
def test_a_user_without_name_and_home_gets_both(tmp_path: Path) -> None:
    notes = repair()
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert Path.home() == tmp_path / f"tsm-uid{os.getuid()}" and stat.S_IMODE(Path.home().stat().st_mode) == 0o700
    assert len(notes) == 2 and "no name" in notes[0] and "no home folder" in notes[1]
    # A child repairs nothing.
    assert repair() == []


def test_a_home_that_is_missing_keeps_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    (note,) = repair()
    assert f"home folder {tmp_path / 'missing'} cannot be written to" in note
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(tempfile.gettempdir())


@pytest.fixture
def shared() -> Iterator[Path]:
    with shared_folder() as folder:
        yield folder


@needs_root
def test_kernels_are_loaded_from_no_strangers_folder(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    monkeypatch.setenv("LOGNAME", "victim")
    monkeypatch.setenv("HOME", str(shared.parent))
    monkeypatch.setenv("TSM_LOCAL_DISK", str(shared))
    monkeypatch.setenv("TMPDIR", str(shared))
    # setenv first, so that what the repair sets is undone too.
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    as_stranger('mkdir -p "$1/triton" "$1/tsm-victim/triton"', shared)
    (note,) = repair()
    assert "tsm-victim belongs to nobody" in note
    cache = Path(os.environ.pop("TRITON_CACHE_DIR"))
    assert cache.name == "triton" and cache.parent.parent == shared
    assert cache.parent.stat().st_uid == os.geteuid() and stat.S_IMODE(cache.parent.stat().st_mode) == 0o700

    # A folder in which the stranger can rename ours.
    shared.chmod(0o777)
    (note,) = repair()
    assert "TRITON_CACHE_DIR" not in os.environ
    assert "Triton's cache stays in the home folder: other users can replace folders in" in note and "Fix:" in note
    monkeypatch.setenv("HOME", str(shared / "missing"))
    with pytest.raises(EnvironmentFault, match=r"other users can replace folders in .*Fix: chmod \+t"):
        repair()


# --- Limits -----------------------------------------------------------------------------------------------------------

OPEN = (
    "import resource; from runtime.environment import EnvironmentFault, allow_open_files\n"
    "try: allow_open_files(300, 50, 'with these loader workers'); print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    "except EnvironmentFault as error: print(error)\n"
)


@pytest.mark.parametrize(
    ("limits", "printed"),
    [
        ("ulimit -Sn 64; ulimit -Hn 1000", "(300, 1000)"),
        ("ulimit -Sn 64; ulimit -Hn 200", "(200, 200)"),
        ("ulimit -Sn 500; ulimit -Hn 1000", "(500, 1000)"),
        ("ulimit -n 40", "a process may open 40 files, and needs 50 with these loader workers. Fix: ulimit -n 300"),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(limits: str, printed: str) -> None:
    assert run(OPEN, limits=limits).stdout.startswith(printed)


def test_a_limit_of_file_sizes_is_a_note() -> None:
    program = "from runtime.environment import raise_limits; print(*raise_limits())"
    assert run(program).stdout == "\n"
    assert run(program, limits="ulimit -Sf 2000").stdout == "\n"
    assert "larger than 2.0 MiB" in run(program, limits="ulimit -f 2048").stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "'/data/x'. Fix: free some space"),
        (OSError(errno.EROFS, "Read-only file system", "/data/x"), "can be written to"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "give you access"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
    ],
)
def test_errors_of_the_machine_are_explained(error: Exception, words: str) -> None:
    explanation = explain(error)
    assert explanation is not None and words in explanation and "Fix: " in explanation


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "No such file"), RuntimeError("shapes differ"), KeyError(28)])
def test_errors_that_may_be_the_programs_own_are_not(error: Exception) -> None:
    assert explain(error) is None

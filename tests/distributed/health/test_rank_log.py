"""Logs in a temporary folder that a stranger writes to as well: nothing of the stranger's is used, or waited for."""

import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.health.rank_log import RankLog, node_log, read_node_log, remove_old_logs
from runtime.private_folder import check_private, open_private_file, private_folder
from tests.helpers.stranger import STRANGER, as_stranger, needs_root, shared_folder


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of this process, whose user is called `victim`. pytest has made its own before, by `tmp_path`."""
    with shared_folder() as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.setenv("LOGNAME", "victim")
        yield folder


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def log_lines(run: Path, rank: int = 7) -> Path | None:
    """Log a line as a rank of this run, and return the file. Fails rather than wait forever in open()."""
    log = RankLog(rank, "n1")

    def write() -> None:
        log.open_in(run)
        log.info("a line")

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "the log blocks"
    path = log.path
    log.close()
    return path


PLANTS = {
    "a link below it": 'mkdir -p "$1/tsm-victim/run" && ln -s "$2" "$1/tsm-victim/run/rank-00007.log"',
    "a FIFO below it": 'mkdir -p "$1/tsm-victim/run" && mkfifo "$1/tsm-victim/run/rank-00007.log"',
    "a link to a folder": 'ln -s "$(dirname "$2")" "$1/tsm-victim"',
    "a link to nothing": 'ln -s "$1/missing" "$1/tsm-victim"',
    "a FIFO": 'mkfifo "$1/tsm-victim"',
    "a file": 'touch "$1/tsm-victim"',
    "a closed folder": 'mkdir -m 700 "$1/tsm-victim"',
}


@needs_root
@pytest.mark.parametrize("plant", PLANTS)
def test_a_strangers_folder_is_never_used(
    shared: Path, tmp_path: Path, plant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "precious" / ".bashrc"
    victim.parent.mkdir()
    victim.write_text("mine")
    as_stranger(PLANTS[plant], shared, victim)
    before = sorted(shared.rglob("*"))
    assert read_node_log("run", 7).startswith("(no log")

    path = log_lines(tmp_path / "run")
    assert path is not None and "a line" in path.read_text()
    assert path == node_log("run", 7) and "a line" in read_node_log("run", 7)
    private = path.parent.parent
    assert private.name.startswith("tsm-victim.")
    assert (mode_of(private), mode_of(path.parent), mode_of(path)) == (0o700, 0o700, 0o600)
    assert "tsm-victim belongs to nobody (user id 65534)" in capsys.readouterr().err
    # Other ranks find the same folder.
    assert log_lines(tmp_path / "run", 8) == path.with_name("rank-00008.log")

    assert victim.read_text() == "mine" and list(victim.parent.iterdir()) == [victim]
    assert [each for each in sorted(shared.rglob("*")) if not each.is_relative_to(private)] == before


@needs_root
def test_an_own_folder_that_others_can_change_is_not_used(shared: Path, tmp_path: Path) -> None:
    (shared / "tsm-victim").mkdir()
    (shared / "tsm-victim").chmod(0o777)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    as_stranger(PLANTS["a link below it"], shared, victim)
    path = log_lines(tmp_path / "run")
    assert path is not None and path.parent.parent.name.startswith("tsm-victim.")
    assert victim.read_text() == "mine"
    # The next start uses the usual name, and readers the newer log.
    (shared / "tsm-victim").rename(shared / "aside")
    os.utime(path, (1, 1))
    assert log_lines(tmp_path / "run") == node_log("run", 7) == shared / "tsm-victim" / "run" / "rank-00007.log"


def test_an_own_folder_that_others_can_read_is_closed(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shared / "tsm-victim").mkdir(mode=0o755)
    for _ in range(2):
        path = log_lines(tmp_path / "run")
    assert path == shared / "tsm-victim" / "run" / "rank-00007.log" and path.read_text().count("a line") == 2
    assert mode_of(shared / "tsm-victim") == 0o700
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_replaced_after_the_check_is_not_used(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sticky bit a stranger can rename the folder, and make a link in its place, at any time."""
    folder, _ = private_folder()
    (shared / "other").mkdir(mode=0o700)

    def check(path: Path) -> os.stat_result:
        found = check_private(path)
        path.rename(shared / "aside")
        (shared / "other").rename(path)
        return found

    monkeypatch.setattr("runtime.private_folder.check_private", check)
    with pytest.raises(PermissionError, match="was replaced by another user"):
        open_private_file(str(folder / "run" / "rank-00007.log"), os.O_WRONLY | os.O_CREAT)
    assert list(folder.iterdir()) == []


def test_a_fifo_of_our_own_is_an_error(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shared / "tsm-victim" / "run").mkdir(parents=True, mode=0o700)
    os.mkfifo(shared / "tsm-victim" / "run" / "rank-00007.log")
    assert log_lines(tmp_path / "run") is None
    assert "no log in" in capsys.readouterr().err


@needs_root
def test_a_file_system_that_gives_files_to_another_user(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NFS does so to root. The job continues without the log, and leaves nothing."""
    mkdtemp = tempfile.mkdtemp

    def squashed(**arguments: str) -> str:
        name = mkdtemp(**arguments)
        os.chown(name, STRANGER, STRANGER)
        return name

    monkeypatch.setattr(tempfile, "mkdtemp", squashed)
    as_stranger('mkdir "$1/tsm-victim"', shared)
    assert log_lines(tmp_path / "run") is None
    assert "belongs to nobody" in capsys.readouterr().err
    assert list(shared.iterdir()) == [shared / "tsm-victim"]


def test_old_logs_are_removed(shared: Path, tmp_path: Path) -> None:
    logs = {run: log_lines(tmp_path / run) for run in ("old", "recent", "this")}
    second = log_lines(tmp_path / "old", 8)
    (shared / "tsm-victim" / "triton").mkdir()
    for path, days in ((logs["old"], 15), (second, 13), (logs["recent"], 13), (logs["this"], 15)):
        assert path is not None
        os.utime(path, (0, time.time() - days * 86400))
    remove_old_logs("this")
    assert sorted(path.name for path in shared.glob("*/old/*")) == ["rank-00008.log"]
    assert second is not None
    os.utime(second, (0, 0))
    remove_old_logs("this")
    assert sorted(path.name for path in (shared / "tsm-victim").iterdir()) == ["recent", "this", "triton"]

"""The folder of staged files on a node's disk that strangers write to as well: made by this job, or the job ends with 2."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.checkout import CHECKOUT
from tests.helpers.stranger import as_stranger, needs_root, shared_folder

# The functions of job.sh and Slurm that slurm/stage.sh calls; this machine is the node.
STAGE = """
set -euo pipefail
say() { echo "$*"; }
refuse() { say "error: $*" >&2; exit 2; }
source slurm/stage.sh
on_each_node() { bash -c "$1" bash "${@:2}"; }
sbcast() { cp "$2" "$3"; }
[[ -z $2 ]] || random_name() { echo guessed; }
TSM_LOCAL_DISK=$1 SLURM_JOB_ID=12 TSM_ENVIRONMENT_ARCHIVE=$3
stage_environment
[[ $4 == stays ]] || unstage
"""


@pytest.fixture
def disk() -> Iterator[Path]:
    with shared_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment whose interpreter is a shell script."""
    folder = tmp_path_factory.mktemp("environment")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text("#!/bin/sh\n")
    (folder / "bin" / "python").chmod(0o755)
    packed = folder.with_suffix(".tar.gz")
    subprocess.run(["tar", "--create", "--gzip", f"--file={packed}", f"--directory={folder}", "."], check=True)
    return packed


def stage(disk: Path, archive: Path, name: str = "", end: str = "stays") -> subprocess.CompletedProcess[str]:
    """Stage the environment. `name`: the random part of the folder's name, if the stranger could guess it."""
    command = ["bash", "-c", STAGE, "bash", str(disk), name, str(archive), end]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)


def test_the_folder_has_a_name_of_its_own_and_is_closed(disk: Path, archive: Path) -> None:
    assert stage(disk, archive, end="unstage").returncode == 0
    assert list(disk.iterdir()) == []
    assert stage(disk, archive).returncode == 0
    (folder,) = disk.iterdir()
    assert len(folder.name) == len("tsm-staged-12-") + 16
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "environment" / "bin" / "python").exists()
    # A requeued start takes it over, with the data in it.
    (folder / "data").mkdir()
    assert stage(disk, archive).returncode == 0
    (second,) = disk.iterdir()
    assert second.name != folder.name and (second / "data").exists()


@needs_root
def test_what_a_stranger_has_made_is_left_alone(disk: Path, archive: Path, tmp_path: Path) -> None:
    plants = "tsm-staged-12", "tsm-staged-12-0123456789abcdef", "tsm-staged-12.tar.gz"
    as_stranger('cd "$1" && mkdir -p "$2/environment" && mkdir "$3" && ln -s "$5" "$4"', disk, *plants, tmp_path / "x")
    assert stage(disk, archive).returncode == 0
    (folder,) = (each for each in disk.iterdir() if each.name not in plants)
    assert folder.stat().st_uid == os.geteuid()
    assert [list((disk / name).rglob("*")) for name in plants[:2]] == [[disk / plants[0] / "environment"], []]
    assert not (tmp_path / "x").exists()


@needs_root
@pytest.mark.parametrize(
    ("plant", "kind"),
    [("mkdir", "directory"), ("mkfifo", "fifo"), ("touch", "regular empty file"), ("ln -s /tmp", "symbolic link")],
)
def test_a_stranger_who_guesses_the_name_is_named(disk: Path, archive: Path, plant: str, kind: str) -> None:
    as_stranger(f'{plant} "$1/tsm-staged-12-guessed"', disk)
    ended = stage(disk, archive, "guessed")
    assert ended.returncode == 2
    assert "File exists" in ended.stderr and f"it is a {kind} of nobody (user id 65534)" in ended.stderr
    assert "error: no folder for staged files" in ended.stderr and "Fix:" in ended.stderr


def test_a_disk_where_strangers_can_replace_folders(disk: Path, archive: Path) -> None:
    disk.chmod(0o777)
    ended = stage(disk, archive)
    assert ended.returncode == 2
    assert f"other users can replace folders in {disk} (mode 777). Fix: chmod +t {disk}" in ended.stderr
    assert list(disk.iterdir()) == []


def test_nodes_that_share_a_disk(disk: Path, archive: Path) -> None:
    """The first makes the folder, the others find it."""
    assert [stage(disk, archive, "guessed").returncode for _ in range(2)] == [0, 0]

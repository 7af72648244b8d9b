"""Verify with prepare.py: name everything that differs from the manifests, and nothing else."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import prepare
from pipelines.jpeg_clips import JPEG_FRAMES
from pipelines.manifest import Manifest, ManifestRow, write_manifest
from tests.helpers.clips import smooth_video, write_both_kinds, write_video

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same clips as `files` and in `shards` of about two clips each."""
    root = tmp_path_factory.mktemp("made")
    write_both_kinds(root / "files", {"train": 3, "val": 3})
    assert prepare.main(["folder", "--root", str(root / "files"), "--workers", "0"]) == 0
    shard = ["--root", str(root / "files"), "--to", str(root / "shards"), "--shard-size", "32KB", "--workers", "0"]
    assert prepare.main(["shard", *shard]) == 0
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def faults(root: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """Return the faults that `verify` prints; check its exit code."""
    capsys.readouterr()
    code = prepare.main(["verify", "--root", str(root), "--workers", "0", *options])
    said = capsys.readouterr()
    bad = re.findall("^BAD (.*)$", said.out, re.MULTILINE)
    assert code == (2 if bad else 0)
    assert (f"{len(bad)} faults in" in said.err) == bool(bad)
    return bad


def row_of(root: Path, frames: bool) -> ManifestRow:
    manifest = Manifest.open(root / "train.arrow")
    return next(row for row in map(manifest.row, range(6)) if (row.codec == JPEG_FRAMES) == frames)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("options", [[], ["--decode"]])
@pytest.mark.parametrize("kind", ["files", "shards"])
def test_what_is_right(made: Path, kind: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert faults(made / kind, capsys, *options) == []


def test_with_processes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = row_of(folder / "files", frames=False).path
    (folder / "files" / lost).unlink()
    command = [sys.executable, "prepare.py", "verify", "--root", str(folder / "files"), "--workers", "2"]
    ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert re.findall("^BAD .*$", ended.stdout, re.MULTILINE) == [
        f"BAD {folder}/files/train.arrow, row 0: {folder}/files/{lost}: No such file or directory"
    ]


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a video is gone": (lambda root: (root / "train/one/1.mp4").unlink(), "1.mp4: No such file"),
    "a video is longer": (lambda root: overwrite(root / "train/one/1.mp4", 100_000, b"x"), "1.mp4: 100001 bytes, but"),
    "a frame is gone": (lambda root: (root / "train/two/1/00008.jpg").unlink(), "00008.jpg: No such file"),
    "a frame is another": (lambda root: (root / "train/two/1/00003.jpg").write_bytes(b"x"), "%05d.jpg: .* bytes, but"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_faults_of_files(folder: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, says = FILE_FAULTS[fault]
    spoil(folder / "files")
    (line,) = faults(folder / "files", capsys)
    assert re.search(says, line)


@pytest.mark.parametrize("frames", [False, True])
def test_a_byte_of_a_shard(folder: Path, frames: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Detect one flipped bit within a clip by the sha256 of its shard only."""
    row = row_of(folder / "shards", frames)
    path, place = folder / "shards" / row.path, row.offset + row.length - 40
    overwrite(path, place, bytes([path.read_bytes()[place] ^ 1]))
    (line,) = faults(folder / "shards", capsys)
    assert line.startswith(f"{path}: its sha256 differs from that in shards.json. Fix: remove it")


def test_a_shard_is_made_again_as_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder / "shards" / "train-000001.tar"
    overwrite(shard, 3000, b"spoilt")
    assert faults(folder / "shards", capsys)
    shard.unlink()
    again = ["--root", str(folder / "files"), "--to", str(folder / "shards"), "--shard-size", "32KB", "--workers", "0"]
    assert prepare.main(["shard", *again]) == 0
    assert faults(folder / "shards", capsys) == []


def test_a_shard_that_is_gone_or_cut_short(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Name a missing or truncated shard and each of its clips."""
    root = folder / "shards"
    os.truncate(root / "train-000000.tar", 600)
    (root / "train-000001.tar").unlink()
    lines = faults(root, capsys)
    assert re.match(rf"{root}/train-000000\.tar: 600 bytes, but \d+ in shards\.json\. Fix: remove it", lines[0])
    assert lines[1].startswith(f"{root}/train-000001.tar: No such file")
    manifest = Manifest.open(root / "train.arrow")
    lost = [number for number in range(6) if manifest.row(number).path in ("train-000000.tar", "train-000001.tar")]
    assert [int(match[1]) for line in lines if (match := re.search(r"row (\d+):", line))] == lost


def test_a_bit_of_a_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Detect a label that has changed in a manifest."""
    path = folder / "files" / "train.arrow"
    content = path.read_bytes()
    labels = np.array([0, 0, 0, 1, 1, 1], dtype="<i4").tobytes()
    assert content.count(labels) == 1
    path.write_bytes(content.replace(labels, labels[:20] + bytes(4)))
    assert faults(folder / "files", capsys) == [
        f"{path}: its rows do not match its digest. Fix: make the manifest again"
    ]


@pytest.mark.parametrize("change", ["offset", "length", "frames"])
def test_a_manifest_of_other_shards(folder: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder / "shards"
    manifest = Manifest.open(root / "train.arrow")
    rows = [vars(manifest.row(number)).copy() for number in range(6)]
    wanted = next(row for row in rows if (row["codec"] == JPEG_FRAMES) == (change == "frames"))
    wanted["length" if change == "frames" else change] += 512
    write_manifest(root / "train.arrow", [ManifestRow(**row) for row in rows], manifest.classes)
    lines = faults(root, capsys)
    assert (
        lines[0] == f"{root}/train.arrow has another digest than in shards.json: the shards belong to another manifest"
    )
    assert len(lines) == 2 and wanted["path"] in lines[1]


def test_what_only_decoding_finds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Find with --decode another clip of the same length and an overwritten JPEG: files have no recorded sha256."""
    root = folder / "files"
    size = (root / "train/one/0.mp4").stat().st_size
    other = write_video(folder / "other.mp4", smooth_video(5, seed=9)).read_bytes()
    assert len(other) < size
    free_box = (size - len(other)).to_bytes(4, "big") + b"free"
    (root / "train/one/0.mp4").write_bytes((other + free_box).ljust(size, b"\0"))
    frame = root / "train/two/0/00002.jpg"
    frame.write_bytes(bytes(frame.stat().st_size))
    assert faults(root, capsys) == []
    video, picture = faults(root, capsys, "--decode")
    assert "0.mp4: num_frames is 5, but 8 when the manifest was made" in video
    assert "00002.jpg: not a JPEG file" in picture


def test_shards_without_their_index(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder / "shards"
    (root / "val.arrow").unlink()
    fix = "Fix: run the same prepare.py shard command again"
    assert faults(root, capsys) == [f"{root}/val.arrow is missing. {fix}"]
    (root / "shards.json").unlink()
    assert faults(root, capsys) == [f"{root}/shards.json is missing, so no shard's sha256 is known. {fix}"]
    (root / "shards.json").write_text("{}")
    assert prepare.main(["verify", "--root", str(root)]) == 2
    assert "shards.json is no index of shards" in capsys.readouterr().err


def test_nothing_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for root, says in ((tmp_path / "none", "no such folder"), (tmp_path, "contains no manifest (*.arrow)")):
        assert prepare.main(["verify", "--root", str(root)]) == 2
        assert says in capsys.readouterr().err

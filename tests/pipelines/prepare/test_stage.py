"""Stage files with prepare.py: read copies on the node's own disk instead of the shared files while they are good."""

import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
from pipelines.decoding import shard_reader, staged_copies
from pipelines.decoding.clip_bytes import clip_bytes, image_bytes
from pipelines.decoding.decode import decode_clip
from pipelines.errors import BadClip
from pipelines.jpeg_clips import JPEG_FRAMES
from pipelines.manifest import Manifest, ManifestRow
from pipelines.prepare.repack.shard_index import read_shard_index
from pipelines.prepare.repack.stage import CopyTask, copy_files, parse_range
from pipelines.stream.order import StreamOrder
from tests.helpers.clips import write_both_kinds
from tests.helpers.small_disk import mounted
from tests.helpers.stranger import as_stranger, needs_root, shared_folder

KINDS = ("files", "shards", "elsewhere")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same clips as `files`, in `shards`, and in a data set `elsewhere` whose manifests refer to `files`."""
    root = tmp_path_factory.mktemp("made")
    write_both_kinds(root / "files", {"train": 6, "val": 2})
    assert prepare.main(["folder", "--root", str(root / "files"), "--workers", "0"]) == 0
    shard = ["--root", str(root / "files"), "--to", str(root / "shards"), "--shard-size", "40KB", "--workers", "0"]
    assert prepare.main(["shard", *shard]) == 0
    (root / "elsewhere").mkdir()
    videos = ["--root", str(root / "elsewhere"), "--videos", str(root / "files")]
    assert prepare.main(["folder", *videos, "--workers", "0"]) == 0
    return root


@pytest.fixture
def shared(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shared"))


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(staged_copies.VARIABLE, raising=False)
    staged_copies._given_up.clear()
    shard_reader.close_shards()
    yield
    staged_copies._given_up.clear()
    shard_reader.close_shards()


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of staged files that readers use."""
    monkeypatch.setenv(staged_copies.VARIABLE, str(tmp_path / "local"))
    return tmp_path / "local"


def stage(root: Path, target: Path, *options: str) -> int:
    return prepare.main(["stage", "--root", str(root), "--to", str(target), "--workers", "0", *options])


def rows_of(root: Path, split: str = "train") -> list[ManifestRow]:
    manifest = Manifest.open(root / f"{split}.arrow")
    return [manifest.row(number) for number in range(len(manifest))]


def pixels(root: Path, row: ManifestRow) -> torch.Tensor:
    return decode_clip("pyav", root, row, np.array([0, 3, 7]))


def hide(shared: Path) -> None:
    """Remove all clips from the shared file system and leave only the manifests."""
    for path in [*shared.rglob("*.mp4"), *shared.rglob("*.jpg"), *shared.rglob("*.tar")]:
        path.unlink()


def readable(root: Path, split: str = "train") -> list[int]:
    """Return the rows that can be decoded."""
    numbers = []
    for number, row in enumerate(rows_of(root, split)):
        try:
            pixels(root, row)
        except BadClip:
            continue
        numbers.append(number)
    return numbers


# --- Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_enough(shared: Path, local: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Read the same clips, bytes and frames from staged files when the shared files are gone."""
    root = shared / kind
    before = {(split, row): pixels(root, row) for split in ("train", "val") for row in rows_of(root, split)}
    assert stage(root, local) == 0
    assert ", 0 present before" in capsys.readouterr().out
    shard_reader.close_shards()
    hide(shared)
    for (_, row), video_TCHW in before.items():
        assert torch.equal(pixels(root, row), video_TCHW)
        if row.codec == JPEG_FRAMES:
            assert len(image_bytes(root, row, 7)[1]) > 100
        else:
            assert len(clip_bytes(root, row)) == row.length
    assert "staged file is bad" not in capsys.readouterr().err


def test_paths_by_another_name(shared: Path, local: Path, tmp_path: Path) -> None:
    """Find the same staged files by a symbolic link to the data and by a relative path."""
    (tmp_path / "link").symlink_to(shared / "shards")
    assert stage(tmp_path / "link", local) == 0
    hide(shared)
    for root in (tmp_path / "link", shared / "shards", Path(os.path.relpath(shared / "shards"))):
        assert len(readable(root)) == 12


def test_another_data_set_of_the_same_names(shared: Path, local: Path, tmp_path: Path) -> None:
    """Ignore staged files of another data set whose shards have the same names."""
    other = Path(shutil.copytree(shared / "shards", tmp_path / "other"))
    assert stage(shared / "shards", local) == 0
    hide(tmp_path / "other")
    shard_reader.close_shards()
    assert readable(other) == []


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_copy_the_shared_file_is_read(shared: Path, local: Path, kind: str) -> None:
    root = shared / kind
    assert stage(root, local) == 0
    copied = sorted(path for path in local.rglob("*") if path.is_file())
    for path in copied[::2]:
        path.unlink()
    shard_reader.close_shards()
    assert len(readable(root)) == 12


def spoil_head(path: Path, row: ManifestRow) -> None:
    with open(path, "r+b") as file:
        file.seek(max(0, row.offset - 512))
        file.write(bytes(600))


def spoil_middle(path: Path, row: ManifestRow) -> None:
    with open(path, "r+b") as file:
        file.seek(row.offset + row.length // 10)
        file.write(np.random.default_rng(0).bytes(row.length * 8 // 10))


def cut(path: Path, row: ManifestRow) -> None:
    os.truncate(path, row.offset + row.length // 2)


@pytest.mark.parametrize("spoil", [spoil_head, spoil_middle, cut])
@pytest.mark.parametrize("kind", ["files", "shards"])
def test_a_copy_that_goes_bad(
    shared: Path, local: Path, kind: str, spoil: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """Return to the shared file, and log it once, when a staged file goes bad during the run with its shard open."""
    root = shared / kind
    assert stage(root, local) == 0
    row = next(row for row in rows_of(root) if row.codec != JPEG_FRAMES)
    video_TCHW = pixels(root, row)
    copy = staged_copies.find_copy(root, row)
    assert copy is not None
    spoil(copy, row)  # type: ignore[operator]
    for _ in range(2):
        assert torch.equal(pixels(root, row), video_TCHW)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "staged file is bad" in line]
    assert str(copy) in line and f"reading {root / row.path}" in line
    assert staged_copies.find_copy(root, row) is None


def test_a_clip_that_is_bad_everywhere(shared: Path, local: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keep reading the staged shard when one of its clips is bad in the shared file as well."""
    root = shared / "shards"
    row = next(row for row in rows_of(root) if row.codec != JPEG_FRAMES)
    assert stage(root, local) == 0
    wrong = replace(row, length=row.length - 1)
    with pytest.raises(BadClip, match=re.escape(str(root / row.path))):
        pixels(root, wrong)
    assert "staged file is bad" not in capsys.readouterr().err
    assert staged_copies.find_copy(root, row) is not None


# --- Copying ----------------------------------------------------------------------------------------------------------


def test_a_second_call_copies_what_is_missing(shared: Path, local: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage(shared / "shards", local) == 0
    copied = sorted(local.rglob("*.tar"))
    copied[1].unlink()
    # A killed call leaves such a file.
    copied[2].rename(copied[2].with_name(copied[2].name + ".tmp"))
    capsys.readouterr()
    assert stage(shared / "shards", local) == 0
    assert f": 2 files copied to {local}" in (said := capsys.readouterr().out)
    assert f", {len(copied) - 2} present before, of {len(copied)}" in said
    assert sorted(local.rglob("*.tar*")) == copied


def test_chosen_shards(shared: Path, local: Path) -> None:
    index = read_shard_index(shared / "shards")
    assert index is not None
    assert stage(shared / "shards", local, "--shards", "1:3") == 0
    assert sorted(path.name for path in local.rglob("*.tar")) == list(index.shards)[1:3]


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_the_clips_of_some_steps(shared: Path, local: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Stage the clips of steps 3 and 4 at 2 clips per step: stream positions 6 to 9."""
    root = shared / kind
    assert stage(root, local, "--first-step", "3", "--steps", "2", "--global-batch", "2", "--seed", "5") == 0
    wanted = set(StreamOrder(12, seed=5).at(np.arange(6, 10))[1].tolist())
    assert len(readable(root)) == 12
    # Clips that were never staged cause no message.
    assert "staged file is bad" not in capsys.readouterr().err
    hide(shared)
    shard_reader.close_shards()
    found = set(readable(root))
    assert found == wanted if kind == "files" else found >= wanted
    assert len(wanted) == 4


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "200k") as disk:
        disk.chmod(0o700)
        monkeypatch.setenv(staged_copies.VARIABLE, str(disk))
        yield disk
        shard_reader.close_shards()


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_as_much_as_fits(shared: Path, small_disk: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Stage the files that fit, and read the rest from the shared file system."""
    root = shared / kind
    assert stage(root, small_disk) == 0
    said = capsys.readouterr().out
    match = re.search(r"no room in \S+ for (\d+) of (\d+) files .*: reading the shared ones", said)
    assert match, said
    left, wanted = int(match[1]), int(match[2])
    assert 0 < left < wanted
    assert f": {wanted - left} files copied" in said
    assert shutil.disk_usage(small_disk).free >= 2000
    assert len(readable(root)) + len(readable(root, "val")) == 16
    hide(shared)
    shard_reader.close_shards()
    assert 0 < len(readable(root)) + len(readable(root, "val")) < 16


def test_a_disk_that_others_fill(shared: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(190_000))
    index = read_shard_index(shared / "shards")
    assert index is not None
    name, facts = next(iter(index.shards.items()))
    source, target = shared / "shards" / name, small_disk / name
    assert copy_files(CopyTask((source,), (target,), facts.bytes, facts.sha256)).endswith("the disk is full")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_shared_shard_that_is_bad_is_not_copied(
    shared: Path, local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard, cut_short, lost = sorted((shared / "shards").glob("train-*.tar"))[:3]
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)
    os.truncate(cut_short, 5000)
    lost.unlink()
    assert stage(shared / "shards", local) == 0
    said = capsys.readouterr().out
    assert f"{shard}: its sha256 differs from that in shards.json: reading the shared file" in said
    assert re.search(rf"{cut_short}: 5000 bytes, but \d+ when its manifest was made: reading", said)
    assert f"{lost}: cannot copy it: No such file or directory: reading" in said
    copied = {path.name for path in local.rglob("*.tar*")}
    assert not copied & {path.name + end for path in (shard, cut_short, lost) for end in ("", ".tmp")} and copied


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--shards", "3"], "'3' is no range"),
        (["--steps", "3"], "--steps needs the run's --global-batch"),
        (["--steps", "0", "--global-batch", "3"], "--steps needs"),
        (["--shards", "1:", "--steps", "3", "--global-batch", "3"], "give one of them"),
    ],
)
def test_wishes_that_cannot_be(
    made: Path, tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage(made / "shards", tmp_path / "local", *options) == 2
    assert says in capsys.readouterr().err


def test_shards_of_files(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage(made / "files", tmp_path / "local", "--shards", "0:3") == 2
    assert "no shards to choose from" in capsys.readouterr().err


def test_a_disk_that_is_none(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert stage(made / "shards", tmp_path / "file" / "local") == 2
    assert "file/local: Not a directory. Fix: choose another folder with --to" in capsys.readouterr().err


def test_only_this_user_can_change_the_copies(made: Path, local: Path) -> None:
    assert stage(made / "shards", local) == 0
    assert stat.S_IMODE(local.stat().st_mode) == 0o700


@needs_root
@pytest.mark.parametrize(
    ("plant", "says"),
    [
        ('mkdir "$1/local"', "belongs to nobody (user id 65534)"),
        ('ln -s "$2" "$1/local"', "belongs to nobody (user id 65534)"),
        (None, "can be changed by other users (mode 777)"),
    ],
)
def test_a_folder_that_a_stranger_can_change_takes_no_copies(
    made: Path, tmp_path: Path, plant: str | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with shared_folder() as folder:
        if plant is not None:
            as_stranger(plant, folder, tmp_path)
        else:
            (folder / "local").mkdir()
            (folder / "local").chmod(0o777)
        assert stage(made / "shards", folder / "local") == 2
        assert f"--to: {folder}/local {says}. Fix: give a folder" in capsys.readouterr().err
        assert list((folder / "local").iterdir()) == []


def test_ranges() -> None:
    assert [parse_range(text) for text in ("0:100", ":7", "7:")] == [slice(0, 100), slice(None, 7), slice(7, None)]

"""Pack clips into shards: same bytes, frames and order as in files, and interrupted or failing writes."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from pipelines.clip_names import clip_name, clip_names
from pipelines.decoding import shard_reader
from pipelines.decoding.clip_bytes import clip_bytes, image_bytes
from pipelines.decoding.decode import choose_decoder, decode_clip
from pipelines.decoding.tar import member_space
from pipelines.errors import BadClip
from pipelines.jpeg_clips import JPEG_FRAMES
from pipelines.loading.clips import ClipSource, TrainingClips
from pipelines.manifest import UNLABELLED, Manifest, ManifestRow, write_manifest
from pipelines.prepare.errors import DataSetError
from pipelines.prepare.repack.job_array import Part, find_part
from pipelines.prepare.repack.shard import RECORDS_NAME, parse_bytes, shard_tasks
from pipelines.prepare.repack.shard_file import write_shard
from pipelines.stream.augmentation import Augmentation
from tests.helpers.clips import plain_video, smooth_video, turned, write_clips, write_frames, write_mp4, write_video
from tests.helpers.flock import break_flock
from tests.helpers.small_disk import mounted

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of every kind of clip: videos in four containers, some of them rotated, and folders of frames."""
    root = tmp_path_factory.mktemp("files")
    for split, count in (("train", 3), ("val", 1)):
        for number in range(count):
            video_THWC = smooth_video(9 + number, seed=number)
            write_video(root / split / "one" / f"{number}.MP4", video_THWC)
            turned(write_video(root / split / "one" / f"turned {number}.mp4", video_THWC), 90)
            write_video(root / split / "two" / f"{number}.mkv", video_THWC)
            write_video(root / split / "two" / f"{number}.avi", video_THWC, "mjpeg", "yuvj420p")
            write_frames(root / split / "three" / f"{number}", video_THWC, first=number % 2)
    assert prepare.main(["folder", "--root", str(root), "--workers", "0"]) == 0
    return root


@pytest.fixture(scope="module")
def shards(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same clips in shards."""
    target = tmp_path_factory.mktemp("prepared") / "shards"
    assert shard(files, target, "40KB") == 0
    return target


@pytest.fixture(autouse=True)
def _opened_anew() -> Iterator[None]:
    shard_reader.close_shards()
    yield
    shard_reader.close_shards()


def shard(root: Path, target: Path, size: str = "40KB", *options: str) -> int:
    return prepare.main(
        ["shard", "--root", str(root), "--to", str(target), "--shard-size", size, "--workers", "0", *options]
    )


def rows_of(root: Path, split: str = "train") -> list[ManifestRow]:
    manifest = Manifest.open(root / f"{split}.arrow")
    return [manifest.row(number) for number in range(len(manifest))]


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


# --- The same clips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
def test_clips_are_the_same_as_in_files(files: Path, shards: Path, split: str, decoder: str) -> None:
    try:
        choose_decoder(decoder)
    except ValueError as error:
        pytest.skip(str(error))
    of_files, of_shards = Manifest.open(files / f"{split}.arrow"), Manifest.open(shards / f"{split}.arrow")
    assert (of_files.classes, of_files.split) == (of_shards.classes, of_shards.split)
    for row, packed in zip(rows_of(files, split), rows_of(shards, split), strict=True):
        assert packed.path.endswith(".tar")
        assert replace(packed, path=row.path, offset=row.offset, length=row.length, name="") == row
        assert packed.name == clip_name(row)
        frame_T = np.array([row.num_frames - 1, 0, 4, 4])
        video_TCHW = decode_clip(decoder, shards, packed, frame_T)
        assert torch.equal(video_TCHW, decode_clip(decoder, files, row, frame_T))
        if row.codec == JPEG_FRAMES:
            for frame in range(row.num_frames):
                assert image_bytes(shards, packed, frame)[1] == image_bytes(files, row, frame)[1]
        else:
            assert clip_bytes(shards, packed).tobytes() == (files / row.path).read_bytes()


def test_training_sees_the_same_batches(files: Path, shards: Path) -> None:
    augmentation = Augmentation(4, 32, "uniform", (1.0, 0.75), "random")
    batches = []
    for root in (files, shards):
        clips = TrainingClips(ClipSource(root / "train.arrow", "pyav"), augmentation, seed=3)
        batches.append(clips[np.arange(12, 20)])
    assert torch.equal(batches[0].video_NTCHW, batches[1].video_NTCHW)
    assert torch.equal(batches[0].label_N, batches[1].label_N)
    assert batches[0].bad_clips == batches[1].bad_clips == ()


def test_only_the_frames_asked_for_are_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in rows_of(shards) if row.codec == JPEG_FRAMES)
    read, real = [], os.preadv

    def count(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(sum(map(len, buffers)))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", count)
    frames = {number: image_bytes(shards, row, number)[1] for number in (0, 5)}
    index_bytes = 16 * row.num_frames
    assert read == [512 + index_bytes, 512 + len(frames[0]), 512 + len(frames[5])]


# --- Shard files ------------------------------------------------------------------------------------------------------


def test_shards_are_plain_tar_files(files: Path, shards: Path) -> None:
    """Read shards with Python's tarfile and with tar; a clip's members share one key, its row in the manifest."""
    members: dict[str, dict[str, bytes]] = {}
    for path in sorted(shards.glob("train-*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                key, _, ending = member.name.partition(".")
                content = shard.extractfile(member)
                assert content is not None
                members.setdefault(key, {})[ending] = content.read()
        listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
        assert not listed.stderr and set(listed.stdout.split()) <= {
            f"{key}.{ending}" for key in members for ending in members[key]
        }
    rows = rows_of(files)
    assert list(members) == [f"{number:09d}" for number in range(len(rows))]
    for row, clip in zip(rows, members.values(), strict=True):
        assert clip.pop("cls") == str(row.label).encode()
        if row.codec == JPEG_FRAMES:
            assert list(clip)[:2] == ["index", "00000.jpg"] and len(clip) == 1 + row.num_frames
        else:
            assert clip == {row.path.rpartition(".")[2].lower(): (files / row.path).read_bytes()}


def test_the_index_names_every_shard(shards: Path) -> None:
    index = json.loads((shards / "shards.json").read_text())
    found = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in tars(shards).items()
    }
    assert index["shards"] == found
    assert index["manifests"] == {
        f"{split}.arrow": Manifest.open(shards / f"{split}.arrow").digest for split in ("train", "val")
    }


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.integers(1, 20_000))
@settings(max_examples=50)
def test_rows_are_cut_into_neighbours(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    rows = [ManifestRow(f"{n}.mp4", 0, length, 0, 8, "h264", 32, 32, 0) for n, length in enumerate(lengths)]
    write_manifest(folder / "train.arrow", rows, ["one"])
    tasks = shard_tasks("train", Manifest.open(folder / "train.arrow"), folder, shard_bytes)
    assert [number for task in tasks for number in range(task.first, task.last)] == list(range(len(lengths)))
    space = [member_space(length) + member_space(1) for length in lengths]
    for task, following in zip(tasks, [*tasks[1:], None], strict=True):
        size = sum(space[task.first : task.last])
        assert size <= shard_bytes or task.last == task.first + 1
        assert following is None or size + space[following.first] > shard_bytes


def test_shards_of_shards(shards: Path, tmp_path: Path) -> None:
    """Repack shards into shards of another size, without the files."""
    assert shard(shards, tmp_path / "again", "1MB") == 0
    assert clip_names(Manifest.open(tmp_path / "again" / "val.arrow")) == clip_names(
        Manifest.open(shards / "val.arrow")
    )
    for row, again in zip(rows_of(shards), rows_of(tmp_path / "again"), strict=True):
        frame_T = np.array([0, 3])
        assert torch.equal(
            decode_clip("pyav", shards, row, frame_T), decode_clip("pyav", tmp_path / "again", again, frame_T)
        )


# --- Changed or broken shards -----------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def bad_reason(root: Path, row: ManifestRow) -> str:
    with pytest.raises(BadClip) as caught:
        decode_clip("pyav", root, row, np.array([0, row.num_frames - 1]))
    assert str(root / row.path) in str(caught.value)
    return str(caught.value)


def test_a_shard_that_is_gone(spoiled: Path) -> None:
    row = rows_of(spoiled)[0]
    (spoiled / row.path).unlink()
    assert "No such file" in bad_reason(spoiled, row)


@pytest.mark.parametrize("kind", ["video", "frames"])
def test_a_shard_that_is_cut_short(spoiled: Path, kind: str) -> None:
    row = next(row for row in rows_of(spoiled) if (row.codec == JPEG_FRAMES) == (kind == "frames"))
    os.truncate(spoiled / row.path, row.offset + row.length - 1)
    assert "truncated" in bad_reason(spoiled, row)


def test_a_shard_of_other_clips(spoiled: Path) -> None:
    """Detect another clip in a shard by the header before the clip's bytes."""
    shutil.copy(spoiled / "train-000002.tar", spoiled / "train-000001.tar")
    rows = [row for row in rows_of(spoiled) if row.path == "train-000001.tar"]
    reasons = [bad_reason(spoiled, row) for row in rows]
    assert reasons and all("replaced" in reason or "truncated" in reason for reason in reasons)


def test_a_shard_is_opened_once(spoiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = [], os.open

    def count(path: Path, flags: int) -> int:
        opened.append(path)
        return real(path, flags)

    monkeypatch.setattr(os, "open", count)
    for row in rows_of(spoiled):
        decode_clip("pyav", spoiled, row, np.array([0]))
    assert len(opened) == len(set(opened)) == len({row.path for row in rows_of(spoiled)})


def test_a_shard_is_closed_once_it_is_forgotten(spoiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    monkeypatch.setattr(os, "close", closed.append)
    shard_reader.Shard(spoiled / "train-000000.tar")
    monkeypatch.undo()
    (descriptor,) = closed
    os.close(descriptor)


def test_a_shard_that_is_open_at_exit_causes_no_message(spoiled: Path) -> None:
    """Keep the module alive to the end, as other modules do in a job: Python then sets its globals to None."""
    script = f"""
import sys
from pathlib import Path
from pipelines.decoding import shard_reader
shard_reader.open_shard(Path({str(spoiled / "train-000000.tar")!r}))
sys.kept = shard_reader
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# --- Interrupted and failing writes -----------------------------------------------------------------------------------


def test_a_finished_data_set_is_left_alone(files: Path, spoiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in spoiled.glob("*")}
    assert shard(files, spoiled) == 0
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in spoiled.glob("*")}


def test_a_new_scan_of_the_source_reaches_the_shards(files: Path, spoiled: Path) -> None:
    manifest = Manifest.open(spoiled / "train.arrow")
    older = [replace(manifest.row(number), fast_seek=None) for number in range(len(manifest))]
    write_manifest(manifest.path, older, manifest.classes, manifest.order_groups, manifest.split)
    assert shard(files, spoiled) == 0
    expected = [Manifest.open(files / "train.arrow").row(number).fast_seek for number in range(len(manifest))]
    assert [Manifest.open(manifest.path).row(number).fast_seek for number in range(len(manifest))] == expected
    assert any(expected) and Manifest.open(manifest.path).digest == manifest.digest


def test_a_manifest_of_an_older_version_gets_the_names(files: Path, spoiled: Path) -> None:
    """It keeps its digest, so that runs resume with it."""
    manifest = Manifest.open(spoiled / "val.arrow")
    older = [replace(manifest.row(number), name="") for number in range(len(manifest))]
    write_manifest(manifest.path, older, manifest.classes, manifest.order_groups, manifest.split)
    assert clip_names(Manifest.open(manifest.path)) is None
    assert shard(files, spoiled) == 0
    assert clip_names(Manifest.open(manifest.path)) == clip_names(Manifest.open(files / "val.arrow"))
    assert Manifest.open(manifest.path).digest == manifest.digest


def test_clips_without_labels(tmp_path: Path) -> None:
    """Their shards hold no labels, and their manifest is one without labels again."""
    (tmp_path / "files").mkdir()
    write_clips(tmp_path / "files" / "test.arrow", [plain_video()] * 2)
    rows = [replace(row, label=UNLABELLED) for row in rows_of(tmp_path / "files", "test")]
    write_manifest(tmp_path / "files" / "test.arrow", rows, ["a", "b", "c"], split="test")
    assert shard(tmp_path / "files", tmp_path / "shards") == 0
    with tarfile.open(tmp_path / "shards" / "test-000000.tar") as file:
        assert file.getnames() == ["000000000.mp4", "000000001.mp4"]
    packed = Manifest.open(tmp_path / "shards" / "test.arrow")
    assert not packed.labelled and clip_names(packed) == ["0", "1"]


@pytest.mark.parametrize("change", ["bit", "gone"])
def test_a_damaged_manifest_is_written_again(files: Path, spoiled: Path, change: str) -> None:
    path = spoiled / "train.arrow"
    content = path.read_bytes()
    labels = Manifest.open(path).labels().tobytes()
    path.write_bytes(content.replace(labels, labels[4:] + labels[:4]))
    if change == "gone":
        path.unlink()
    assert shard(files, spoiled) == 0
    assert path.read_bytes() == content


def test_shards_of_a_damaged_manifest_are_refused(
    spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spoiled / "train.arrow"
    labels = Manifest.open(path).labels().tobytes()
    path.write_bytes(path.read_bytes().replace(labels, labels[4:] + labels[:4]))
    assert shard(spoiled, tmp_path / "to") == 2
    assert "train.arrow: its content does not match its digest" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_a_lost_shard_is_made_again(files: Path, spoiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tars(spoiled)
    (spoiled / "train-000001.tar").unlink()
    assert shard(files, spoiled) == 0
    assert "; 1 written" in capsys.readouterr().out
    assert tars(spoiled) == before


def test_parts_make_the_same_shards(files: Path, shards: Path, tmp_path: Path) -> None:
    target = tmp_path / "parts"
    for number in (2, 3, 1):
        assert not (target / "train.arrow").exists()
        assert shard(files, target, "40KB", "--part", f"{number}/3") == 0
    assert tars(target) == tars(shards)
    for name in ("shards.json", "train.arrow", "val.arrow"):
        assert (target / name).read_bytes() == (shards / name).read_bytes()


def test_a_file_system_without_flock(
    files: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fall back to lease files, of which none is left."""
    break_flock(monkeypatch)
    assert shard(files, tmp_path / "made") == 0
    assert tars(tmp_path / "made") == tars(shards)
    assert not list(tmp_path.rglob("*.lease"))


@pytest.mark.slow
def test_two_calls_at_once_make_the_same_shards(files: Path, shards: Path, tmp_path: Path) -> None:
    command = shard_command(files, tmp_path / "both")
    both = [subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert shard(files, tmp_path / "both") == 0
    assert tars(tmp_path / "both") == tars(shards)


def shard_command(root: Path, target: Path, size: str = "40KB") -> list[str]:
    options = ["--root", str(root), "--to", str(target), "--shard-size", size, "--workers", "2"]
    return [sys.executable, "prepare.py", "shard", *options]


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path) -> None:
    """Resume after several SIGKILLs: every file under a shard's name is complete, and the result is the same."""
    root = tmp_path / "many"
    first = write_mp4(root / "train" / "one" / "000.mp4", plain_video(4))
    for number in range(1, 120):
        shutil.copy(first, first.with_name(f"{number:03d}.mp4"))
    shutil.copytree(root / "train", root / "val")
    assert prepare.main(["folder", "--root", str(root), "--workers", "0"]) == 0
    assert shard(root, tmp_path / "whole", "6KB") == 0
    whole, target = tars(tmp_path / "whole"), tmp_path / "killed"
    command = shard_command(root, target, "6KB")
    seen = 0
    for _ in range(3):
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 60
        while len(list(target.glob("*.tar"))) < seen + 5 and time.monotonic() < deadline_s:
            time.sleep(0.005)
        process.kill()
        process.wait()
        found = tars(target)
        assert seen < len(found) < len(whole)
        assert all(whole[name] == content for name, content in found.items())
        assert not (target / "train.arrow").exists() and not (target / "shards.json").exists()
        seen = len(found)
    subprocess.run(command, cwd=CHECKOUT, check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert tars(target) == whole
    assert (target / "shards.json").read_bytes() == (tmp_path / "whole" / "shards.json").read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "100k") as disk:
        yield disk


def test_no_room_is_said_before_anything_is_written(
    files: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(files, small_disk / "shards") == 2
    assert re.search(r"0\.000\d+ GB to write, but 9\S+ GB free. Fix: free space", capsys.readouterr().err)
    assert not tars(small_disk / "shards")


def test_a_disk_that_fills_up(files: Path, small_disk: Path) -> None:
    (small_disk / RECORDS_NAME).mkdir()
    (task,) = shard_tasks("train", Manifest.open(files / "train.arrow"), small_disk, 10**9)
    assert "No space left on device. Fix: free space there" in write_shard(task)
    assert [path.name for path in small_disk.iterdir()] == [RECORDS_NAME]
    assert [path.suffix for path in (small_disk / RECORDS_NAME).iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("lost", "says"),
    [("two/1.mkv", "two/1.mkv: No such file"), ("three/1/00004.jpg", "three/1/.*00004.jpg: No such file")],
)
def test_a_source_that_cannot_be_read(
    files: Path, tmp_path: Path, lost: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(files, tmp_path / "source"))
    (source / "train" / lost).unlink()
    assert shard(source, tmp_path / "shards") == 2
    assert re.search(says + ".* Fix: make the manifest again", capsys.readouterr().err)
    assert not list((tmp_path / "shards").glob("*.tmp")) and not (tmp_path / "shards" / "shards.json").exists()


def test_frames_that_have_changed_since(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(files, tmp_path / "source"))
    (source / "train" / "three" / "2" / "00004.jpg").write_bytes(b"another")
    assert shard(source, tmp_path / "shards") == 2
    assert re.search(r"three/2/%05d.jpg: frames have \d+ bytes, but had \d+ when", capsys.readouterr().err)


def test_what_may_not_be_mixed(files: Path, spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target, size, says in (
        (files, "1GB", "is the folder of the data set itself"),
        (spoiled, "1GB", "was made from other manifests or with other options"),
        (tmp_path, "1GB", "is not empty, and was not made by this command"),
        (tmp_path / "new", "1 apple", "'1 apple' is no size"),
    ):
        assert shard(files, target, size) == 2
        assert says in capsys.readouterr().err


def test_a_number_of_processes_that_cannot_be(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shard(files, tmp_path, "1GB", "--workers", "-1")
    assert "'-1' is no number of processes" in capsys.readouterr().err


def test_sizes() -> None:
    assert [parse_bytes(text) for text in ("1GB", "1.5 MiB", "2kb", "17")] == [10**9, 3 * 2**19, 2000, 17]
    for text in ("", "0", "-1", "GB", "1TB "):
        with pytest.raises(ValueError, match="is no size"):
            parse_bytes(text)


# --- Parts of a job array ---------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(0, 30))
def test_parts_are_everything_once(count: int, items: int) -> None:
    dealt = [item for number in range(1, count + 1) for item in Part(number, count).of(range(items))]
    assert sorted(dealt) == list(range(items))


def array(task: int, count: int, least: int, most: int, step: int = 1) -> dict[str, str]:
    said = {"ID": task, "COUNT": count, "MIN": least, "MAX": most, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in said.items()}


def test_the_tasks_of_a_job_array() -> None:
    assert find_part(None, {}) == Part(1, 1)
    assert [find_part(None, array(task, 4, 0, 3)).number for task in range(4)] == [1, 2, 3, 4]
    assert find_part(None, array(5, 3, 1, 5, step=2)) == Part(3, 3)
    assert find_part("2/7", array(1, 3, 1, 3)) == Part(2, 7)
    with pytest.raises(DataSetError, match="task numbers have gaps"):
        find_part(None, array(7, 3, 0, 7))
    for said in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(DataSetError, match="--part is"):
            find_part(said, {})

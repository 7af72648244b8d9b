"""Transcode clips with prepare.py: same frames in smaller files, and interrupted or failing writes."""

import csv
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import prepare
from pipelines.clip_names import clip_names
from pipelines.decoding.decode import choose_decoder, decode_clip
from pipelines.decoding.video import EncodedVideo, open_video
from pipelines.manifest import Manifest, ManifestRow
from pipelines.prepare.errors import DataSetError
from pipelines.prepare.repack.encoders import ENCODERS
from pipelines.prepare.repack.job_array import Part, part_lock
from pipelines.prepare.repack.rescale import scaled_size
from pipelines.prepare.scan.scan_clip import scan_clip
from tests.helpers.clips import smooth_video, turned, write_frames, write_video
from tests.helpers.small_disk import mounted

CHECKOUT = Path(__file__).resolve().parents[3]
FRAMES = 12
# MJPEG encodes the same frames to the same bytes; x264 does not guarantee that.
SMALL = ["--codec", "mjpeg", "--short-side", "48"]


def write_unsteady(path: Path, video_THWC: np.ndarray) -> Path:
    """Write a video with sound, a start at 1.5 s and a variable frame rate.

    Players would drop and repeat frames to make the rate constant.
    """
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=24, options={"x264-params": "bframes=2:b-adapt=0:threads=1"})
        sound: Any = container.add_stream("aac", rate=8000, layout="mono")
        stream.height, stream.width = video_THWC.shape[1:3]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 240)
        for index, image_HWC in enumerate(video_THWC):
            frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24")
            frame.pts, frame.time_base = 360 + index * (index + 3), Fraction(1, 240)
            container.mux(stream.encode(frame))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        for packet in [*stream.encode(None), *sound.encode(silence), *sound.encode(None)]:
            container.mux(packet)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of difficult clips, each of FRAMES distinguishable frames."""
    root = tmp_path_factory.mktemp("source")
    for split in ("train", "val"):
        write_video(root / split / "a" / "plain.mp4", smooth_video(FRAMES, 96, 128, seed=1))
    folder = root / "train" / "b"
    folder.mkdir()
    write_unsteady(folder / "unsteady.mp4", smooth_video(FRAMES, 96, 128, seed=2))
    turned(write_video(folder / "turned.mp4", smooth_video(FRAMES, 80, 128, seed=3)), 90)
    write_video(folder / "odd.mkv", smooth_video(FRAMES, 95, 127, seed=4), pix_fmt="yuv444p")
    write_video(folder / "deep.mp4", smooth_video(FRAMES, 96, 128, seed=5), pix_fmt="yuv420p10le")
    write_video(folder / "mjpeg.avi", smooth_video(FRAMES, 96, 128, seed=6), "mjpeg", "yuvj420p")
    write_frames(folder / "frames", smooth_video(FRAMES, 95, 127, seed=7), first=0)
    assert prepare.main(["folder", "--root", str(root), "--workers", "0"]) == 0
    return root


def transcode(root: Path, target: Path, *options: str) -> int:
    return prepare.main(["transcode", "--root", str(root), "--to", str(target), "--workers", "0", *options])


def rows_of(root: Path, split: str = "train") -> list[ManifestRow]:
    manifest = Manifest.open(root / f"{split}.arrow")
    return [manifest.row(number) for number in range(len(manifest))]


def whole(root: Path, row: ManifestRow, decoder: str = "pyav") -> torch.Tensor:
    return decode_clip(decoder, root, row, np.arange(row.num_frames)).float()


def encoded_files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for split in ("train", "val")
        for path in sorted((root / split).rglob("*"))
        if path.is_file()
    }


# --- The same frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ENCODERS)
def test_every_frame_shows_what_it_showed(source: Path, tmp_path: Path, codec: str) -> None:
    """Check that each frame, upright, is nearest to the source frame of its own number; with both decoders."""
    assert transcode(source, tmp_path / "made", "--codec", codec, "--short-side", "64", "--gop", "5") == 0
    before, after = rows_of(source), rows_of(tmp_path / "made")
    assert [(row.label, row.num_frames) for row in before] == [(row.label, row.num_frames) for row in after]
    assert Manifest.open(source / "train.arrow").classes == Manifest.open(tmp_path / "made" / "train.arrow").classes
    for old, new in zip(before, after, strict=True):
        assert (new.codec, new.rotation) == (ENCODERS[codec].codec, 0)
        assert (new.width, new.height) == scaled_size(old, 64)
        made_TCHW = whole(tmp_path / "made", new)
        expected_TCHW = torch.nn.functional.interpolate(
            whole(source, old), (new.height, new.width), mode="bicubic", antialias=True
        )
        error_TT = (made_TCHW[:, None] - expected_TCHW[None]).abs().mean((2, 3, 4))
        assert error_TT.argmin(1).tolist() == list(range(FRAMES)), old.path
        assert error_TT.diagonal().max() < 6, old.path
        try:
            by_torchcodec_TCHW = whole(tmp_path / "made", new, choose_decoder("torchcodec"))
        except ValueError:
            continue
        assert (by_torchcodec_TCHW - made_TCHW).abs().mean() < 1
        # The encoders' files need no comparison in a scan, but they would pass it.
        assert codec == "jpeg" or scan_clip(tmp_path / "made" / new.path).fast_seek is new.fast_seek is True


@pytest.mark.parametrize("codec", [codec for codec in ENCODERS if codec != "jpeg"])
def test_what_is_in_the_files(source: Path, tmp_path: Path, codec: str) -> None:
    """Write one stream of 8 bits and 4:2:0, with colour tags and a key frame at the given interval."""
    assert transcode(source, tmp_path / "made", "--codec", codec, "--short-side", "64", "--gop", "5") == 0
    for row in rows_of(tmp_path / "made"):
        with av.open(str(tmp_path / "made" / row.path)) as container:
            assert len(container.streams) == 1
            frames = list(container.decode(video=0))
        keys = [number for number, frame in enumerate(frames) if frame.key_frame]
        assert keys == (list(range(FRAMES)) if codec == "mjpeg" else [0, 5, 10])
        assert {frame.format.name for frame in frames} == {"yuvj420p" if codec == "mjpeg" else "yuv420p"}
        assert {frame.colorspace for frame in frames} == {5}
        times = [frame.time for frame in frames if frame.time is not None]
        steps = [later - earlier for earlier, later in pairwise(times)]
        # WebM stores times in milliseconds.
        assert len(times) == FRAMES and max(steps) - min(steps) < 0.0015


@given(st.integers(16, 4000), st.integers(16, 4000), st.integers(16, 600), st.sampled_from([0, 90, 180, 270]))
def test_sizes(width: int, height: int, short_side: int, rotation: int) -> None:
    row = ManifestRow("c.mp4", 0, 1, 0, 8, "h264", width, height, rotation)
    made = scaled_size(row, short_side)
    upright = (height, width) if rotation in (90, 270) else (width, height)
    assert all(side % 2 == 0 for side in made)
    assert all(after <= before for after, before in zip(made, upright, strict=True))
    if min(upright) <= short_side:
        assert all(before - after < 2 for after, before in zip(made, upright, strict=True))
    else:
        assert abs(min(made) - short_side) <= 1
        assert abs(made[0] / made[1] / (upright[0] / upright[1]) - 1) < 2 / min(made) * 1.5


def test_from_shards_and_into_shards(source: Path, tmp_path: Path) -> None:
    packed = ["--root", str(source), "--to", str(tmp_path / "packed"), "--shard-size", "20KB", "--workers", "0"]
    assert prepare.main(["shard", *packed]) == 0
    for root, name in ((source, "of files"), (tmp_path / "packed", "of shards")):
        assert transcode(root, tmp_path / name, *SMALL) == 0
    assert encoded_files(tmp_path / "of files") == encoded_files(tmp_path / "of shards")
    names = [
        clip_names(Manifest.open(root / "train.arrow"))
        for root in (source, tmp_path / "packed", tmp_path / "of shards")
    ]
    assert names[0] is not None and names[1:] == [names[0]] * 2
    again = ["--root", str(tmp_path / "of files"), "--to", str(tmp_path / "end"), "--workers", "0"]
    assert prepare.main(["shard", *again]) == 0
    assert prepare.main(["verify", "--root", str(tmp_path / "end"), "--decode", "--workers", "0"]) == 0


# --- Clips that cannot be encoded -------------------------------------------------------------------------------------


def reasons(root: Path) -> dict[str, str]:
    with open(root / "bad_files.csv", newline="") as file:
        return {record["path"]: record["reason"] for record in csv.DictReader(file)}


def test_a_clip_that_fails_is_left_out_and_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled = Path(shutil.copytree(source, tmp_path / "spoiled"))
    (spoiled / "train" / "b" / "odd.mkv").unlink()
    (spoiled / "train" / "b" / "frames" / "00005.jpg").write_bytes(b"no picture")
    assert transcode(spoiled, tmp_path / "made", "--short-side", "48") == 2
    assert "2 of 7 clips cannot be decoded, more than the limit of 5.00%" in capsys.readouterr().err
    assert not (tmp_path / "made" / "train.arrow").exists()
    assert transcode(spoiled, tmp_path / "made", "--short-side", "48", "--max-bad", "0.3") == 0
    said = capsys.readouterr().out
    assert "5 of 7 clips, 2 BAD (28.57%)" in said and "LEFT OUT: 2 clips" in said
    assert [row.path[-13:-4] for row in rows_of(tmp_path / "made")] == [
        f"{number:09d}" for number, row in enumerate(rows_of(source)) if not re.search("odd|frames", row.path)
    ]
    found = reasons(tmp_path / "made")
    assert set(found) == {"train/b/odd.mkv", "train/b/frames/%05d.jpg"}
    assert "No such file" in found["train/b/odd.mkv"]
    assert "00005.jpg: not a JPEG file" in found["train/b/frames/%05d.jpg"]
    shutil.copy(source / "train" / "b" / "odd.mkv", spoiled / "train" / "b" / "odd.mkv")
    assert transcode(spoiled, tmp_path / "made", "--short-side", "48", "--max-bad", "0.3") == 0
    assert re.search("1 encoded in .*\n.* 6 of 7 clips, 1 BAD", capsys.readouterr().out)


def test_a_picture_that_has_become_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reject an encoded clip that differs from its source: noise at the lowest quality becomes grey."""
    noise_THWC = np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 64, 3), dtype=np.uint8)
    for split in ("train", "val"):
        write_video(tmp_path / "noise" / split / "one" / "clip.mp4", noise_THWC, options={"crf": "1"})
    assert prepare.main(["folder", "--root", str(tmp_path / "noise"), "--workers", "0"]) == 0
    for codec, poorest in (("h264", "51"), ("jpeg", "31")):
        assert transcode(tmp_path / "noise", tmp_path / codec, "--codec", codec, "--quality", poorest) == 2
        assert re.search(r"frame 0 differs by \d\d\.\d grey levels", capsys.readouterr().err)
        assert not any(path.suffix in (".mp4", ".jpg", ".tmp") for path in (tmp_path / codec).rglob("*"))


def test_a_clip_that_is_too_small_for_x265(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        write_video(tmp_path / "small" / split / "one" / "clip.mp4", smooth_video(FRAMES, 76, 48))
    assert prepare.main(["folder", "--root", str(tmp_path / "small"), "--workers", "0"]) == 0
    assert transcode(tmp_path / "small", tmp_path / "made", "--codec", "hevc") == 2
    error = capsys.readouterr().err
    assert "libx265 needs 64 pixels a side, but it has 48" in error and error.endswith("Fix: repair the clips\n")


# --- Interrupted and failing writes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("made") / "mp4"
    assert transcode(source, target, *SMALL) == 0
    return target


def test_what_is_finished_is_left_alone(source: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.mp4")}
    assert transcode(source, made, *SMALL) == 0
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*.mp4")}
    assert transcode(source, made, "--short-side", "40") == 2
    assert "was made from other manifests or with other options" in capsys.readouterr().err


def test_parts_make_the_same(source: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (3, 1, 2):
        assert not (tmp_path / "parts" / "train.arrow").exists()
        assert transcode(source, tmp_path / "parts", *SMALL, "--part", f"{number}/3") == 0
    assert encoded_files(tmp_path / "parts") == encoded_files(made)
    assert (tmp_path / "parts" / "train.arrow").read_bytes() == (made / "train.arrow").read_bytes()
    assert re.search(r"2 encoded in .*; 6 clips are left for other parts", capsys.readouterr().out)


def test_one_call_at_a_part(tmp_path: Path) -> None:
    with part_lock(Part(1, 3), tmp_path), part_lock(Part(2, 3), tmp_path):
        for part, says in (
            (Part(1, 3), "another process works on part 1/3 of .*"),
            (Part(1, 1), "into another number of parts .part-1-of-3"),
        ):
            with pytest.raises(DataSetError, match=says), part_lock(part, tmp_path):
                pass
    with part_lock(Part(1, 1), tmp_path):
        pass


def count_clips(target: Path) -> int:
    """Count the encoded clips that have their final names."""
    return sum(entry.suffix != ".tmp" for split in ("train", "val") for entry in (target / split).glob("*/*"))


@pytest.mark.slow
# Workers import torch for jpeg.
@pytest.mark.parametrize(("codec", "workers", "kills"), [("mjpeg", 2, 2), ("jpeg", 1, 1)])
def test_killed_and_started_again(tmp_path: Path, codec: str, workers: int, kills: int) -> None:
    """Resume after SIGKILL with the result of an uninterrupted call."""
    root = tmp_path / "many"
    for number in range(15):
        write_video(root / "train" / "a" / f"{number:02d}.mp4", smooth_video(FRAMES, 96, 128, seed=number))
    shutil.copytree(root / "train", root / "val")
    assert prepare.main(["folder", "--root", str(root), "--workers", "0"]) == 0
    options = ["--codec", codec, "--short-side", "48"]
    assert transcode(root, tmp_path / "whole", *options) == 0
    target = tmp_path / "killed"
    command = [
        sys.executable,
        "prepare.py",
        "transcode",
        "--root",
        str(root),
        "--to",
        str(target),
        "--workers",
        str(workers),
        *options,
    ]
    seen = 0
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 60
        while count_clips(target) < seen + 4 and time.monotonic() < deadline_s:
            time.sleep(0.005)
        process.kill()
        process.wait()
        # The workers notice that their parent is gone.
        time.sleep(0.5)
        seen = count_clips(target)
        assert 4 <= seen < 30 and not (target / "train.arrow").exists()
    subprocess.run(command, cwd=CHECKOUT, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert encoded_files(target) == encoded_files(tmp_path / "whole")
    assert (target / "val.arrow").read_bytes() == (tmp_path / "whole" / "val.arrow").read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "40k") as disk:
        yield disk


@pytest.mark.parametrize("codec", ["mjpeg", "jpeg"])
def test_a_full_disk(source: Path, small_disk: Path, codec: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fail with an error that names the full disk, and leave no partial file."""
    assert transcode(source, small_disk / "made", "--codec", codec, "--short-side", "64") == 2
    error = capsys.readouterr().err
    assert "No space left on device. Fix: free space there" in error and "made/train/000000/" in error
    assert not list(small_disk.rglob("*.tmp"))
    for path in small_disk.rglob("*.mp4"):
        with open_video(EncodedVideo(str(path), path)) as container:
            assert sum(1 for _ in container.decode(video=0)) == FRAMES


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--short-side", "8"], "--short-side is 8. Fix: give 16 to 4096"),
        (["--codec", "hevc", "--short-side", "48"], "--short-side is 48. Fix: give 64 to 4096 with --codec hevc"),
        (["--gop", "0"], "--gop is 0"),
        (["--codec", "jpeg", "--quality", "40"], "--quality is 40. Fix: give 1 to 31 with --codec jpeg"),
        (["--max-bad", "5"], "--max-bad is 5.0"),
        (["--part", "5/3"], "--part is '5/3'"),
    ],
)
def test_wrong_options(
    source: Path, tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transcode(source, tmp_path / "made", *options) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "made").exists()

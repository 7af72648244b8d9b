"""Scan and decode real footage from packages that ship some (tools/fetch_footage.py); both decoders must agree.

box_damaged.mp4 has a bitstream error near its start. FFmpeg reports two slices that do not decode, then returns frames
in the order 0, 3, 2, 4, 1. Neither decoder raises an error, but they return different pixels for the same index, so the
clip is bad.
"""

import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import prepare
from pipelines.decoding.decode import choose_decoder, decode_clip
from pipelines.errors import BadClip
from pipelines.jpeg_clips import JPEG_FRAMES
from pipelines.loading.clips import ClipBatch, ClipSource, TrainingClips
from pipelines.loading.worker_loader import ClipLoader, start_worker_server
from pipelines.manifest import Manifest, ManifestRow
from pipelines.prepare.scan.scan_clip import ClipFacts, scan_clip
from pipelines.stream.augmentation import Augmentation
from tests.helpers.clips import turned
from tools.fetch_footage import CLIPS, FootageError, fetch

pytestmark = pytest.mark.slow

FACTS = {
    # Bytes, frames, codec, stored width and height, rotation.
    "person.mp4": ClipFacts(387775, 100, "h264", 1080, 1920, 0),
    "person_vp9.mp4": ClipFacts(540548, 100, "vp9", 1080, 1920, 0),
    "people.mp4": ClipFacts(764061, 100, "h264", 1088, 1920, 0),
    "walk_vp9.mp4": ClipFacts(3968304, 230, "vp9", 1768, 994, 0),
    "bikes.mp4": ClipFacts(509868, 250, "h264", 640, 272, 0),
    "carphone.mp4": ClipFacts(588804, 120, "h264", 176, 144, 0),
    "pedestrians.avi": ClipFacts(8131690, 795, "msmpeg4", 768, 576, 0),
    "tree.avi": ClipFacts(1250680, 68, "cinepak", 320, 240, 0),
    "film_b_frames.avi": ClipFacts(860920, 270, "mpeg4", 720, 528, 0),
    "cup.mp4": ClipFacts(1575951, 217, "h264", 640, 480, 0),
}


@pytest.fixture(scope="session")
def footage() -> dict[str, Path]:
    try:
        return {name: fetch(name) for name in CLIPS}
    except FootageError as error:
        pytest.skip(f"no real footage: {error}")


@pytest.fixture(scope="module", autouse=True)
def _both_decoders() -> None:
    try:
        choose_decoder("torchcodec")
    except ValueError as error:
        pytest.skip(str(error))


def decode_both(path: Path, facts: ClipFacts, frames: list[int]) -> dict[str, torch.Tensor]:
    row = ManifestRow(str(path), 0, label=0, **asdict(facts))
    return {
        decoder: decode_clip(decoder, Path(), row, np.array(frames, dtype=np.int64)).float()
        for decoder in ("pyav", "torchcodec")
    }


def check_agreement(path: Path, facts: ClipFacts, frames: list[int], limit: float = 1.5) -> torch.Tensor:
    """Check that both decoders return the same upright frames, within rounding; return PyAV's."""
    decoded = decode_both(path, facts, frames)
    upright = (facts.width, facts.height) if facts.rotation % 180 else (facts.height, facts.width)
    for video_TCHW in decoded.values():
        assert video_TCHW.shape == (len(frames), 3, *upright)
    difference_T = (decoded["pyav"] - decoded["torchcodec"]).abs().mean((1, 2, 3))
    assert difference_T.max() < limit, difference_T
    return decoded["pyav"]


@pytest.mark.parametrize("name", FACTS)
def test_facts_and_agreement(footage: dict[str, Path], name: str) -> None:
    facts = scan_clip(footage[name])
    # AVI has no time for each frame. The streams may name any colours.
    expected = replace(FACTS[name], fast_seek=not name.endswith(".avi"))
    assert replace(facts, colour_space="", colour_range="") == expected
    last = facts.num_frames - 1
    video_TCHW = check_agreement(footage[name], facts, [1, last // 3, last // 2, last])
    # A single frame takes another seek path. Small images keep this fast.
    if facts.width * facts.height < 500_000:
        check_agreement(footage[name], facts, [last])
    # The images have content, and they move.
    assert video_TCHW.std() > 10 and (video_TCHW[0] - video_TCHW[2]).abs().mean() > 0.1


def test_a_damaged_stream(footage: dict[str, Path]) -> None:
    path = footage["box_damaged.mp4"]
    with pytest.raises(BadClip, match="damaged: frame 2 has an earlier display time than frame 1"):
        scan_clip(path)
    facts = ClipFacts(path.stat().st_size, 455, "h264", 640, 480, 0)
    # Training decodes by the same rule as the scan.
    for decoder in ("pyav", "torchcodec"):
        row = ManifestRow(str(path), 0, label=0, **asdict(facts))
        with pytest.raises(BadClip, match="damaged: frame 2 has"):
            decode_clip(decoder, Path(), row, np.array([7, 76, 223, 420]))


def cut(source: Path, target: Path, *options: str) -> Path:
    command = ["ffmpeg", "-v", "error", "-y", "-i", str(source), "-an", *options, str(target)]
    subprocess.run(command, check=True, timeout=60)
    return target


@pytest.mark.parametrize("clockwise", [90, 180, 270])
def test_a_phone_held_sideways(footage: dict[str, Path], tmp_path: Path, clockwise: int) -> None:
    """Decode a real clip with a display matrix to the frames of the original clip, rotated."""
    path = turned(cut(footage["bikes.mp4"], tmp_path / "cut.mp4", "-c", "copy", "-frames:v", "30"), clockwise)
    facts = scan_clip(path)
    assert (facts.num_frames, facts.width, facts.height, facts.rotation) == (30, 640, 272, 360 - clockwise)
    video_TCHW = check_agreement(path, facts, [0, 29])
    plain_TCHW = check_agreement(footage["bikes.mp4"], FACTS["bikes.mp4"], [0, 29])
    assert torch.equal(video_TCHW, plain_TCHW.rot90(-clockwise // 90, (2, 3)))


@pytest.mark.parametrize("kind", ["cut in the middle", "variable rate", "odd, 10 bits"])
def test_remade_footage(footage: dict[str, Path], tmp_path: Path, kind: str) -> None:
    # A stream copy: an edit list hides the frames between the key frame and the cut.
    if kind == "cut in the middle":
        path = tmp_path / "cut.mp4"
        command = ["ffmpeg", "-v", "error", "-y", "-ss", "1.03", "-i", str(footage["cup.mp4"]), "-t", "2", "-c", "copy"]
        subprocess.run([*command, str(path)], check=True, timeout=60)
    elif kind == "variable rate":
        keep = "select='not(mod(n,7))+gt(mod(n,11),7)'"
        path = cut(footage["carphone.mp4"], tmp_path / "variable.mp4", "-vf", keep, "-vsync", "vfr")
        with av.open(str(path)) as container:
            times = [frame.pts or 0 for frame in container.decode(video=0)]
        assert len(set(np.diff(times))) > 2
    else:
        options = ["-vf", "format=yuv444p10le,crop=175:143:0:0:exact=1", "-c:v", "libx264", "-preset", "ultrafast"]
        path = cut(footage["carphone.mp4"], tmp_path / "odd.mkv", *options, "-t", "1")
    facts = scan_clip(path)
    last = facts.num_frames - 1
    assert last > 20
    check_agreement(path, facts, [0, 3, last // 2, last - 1, last])


# --- Batches ----------------------------------------------------------------------------------------------------------

# Without the large clips, which only cost time.
MIXED = [name for name in FACTS if name not in ("person.mp4", "people.mp4", "walk_vp9.mp4")]
AUGMENTATION = Augmentation(num_frames=4, size=112, flip="on")


@pytest.fixture(scope="module")
def mixed(footage: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One manifest of clips of all kinds, made by prepare.py, which leaves out the damaged clip."""
    root = tmp_path_factory.mktemp("mixed")
    names = [*MIXED, "box_damaged.mp4"]
    (root / "train.txt").write_text("".join(f"{footage[name]} {index % 2}\n" for index, name in enumerate(names)))
    (root / "val.txt").write_text(f"{turned(cut(footage['bikes.mp4'], root / 'side.mp4', '-c', 'copy'), 90)} 0\n")
    (root / "classes.txt").write_text("a\nb\n")
    lists = [part for name in ("train", "val", "classes") for part in (f"--{name}", str(root / f"{name}.txt"))]
    assert prepare.main(["list", "--root", str(root), *lists, "--workers", "2", "--max-bad", "0.15"]) == 0
    assert "box_damaged.mp4" in (root / "bad_files.csv").read_text()
    return root


def batch_of(manifest: Path, decoder: str, positions: NDArray[np.int64], workers: int = 0) -> ClipBatch:
    clips = TrainingClips(ClipSource(manifest, decoder), AUGMENTATION, seed=3)
    (batch,) = ClipLoader(clips, workers, 2).batches([positions])
    assert batch.bad_clips == () and batch.real_N.all()
    return batch


def test_a_batch_of_everything(mixed: Path) -> None:
    """Decode seven clips of five codecs to the same batch with PyAV here and torchcodec in a worker process."""
    start_worker_server()
    positions = np.arange(len(MIXED))
    ours = batch_of(mixed / "train.arrow", "pyav", positions)
    theirs = batch_of(mixed / "train.arrow", "torchcodec", positions, workers=1)
    assert ours.video_NTCHW.shape == (len(MIXED), 4, 3, 112, 112)
    assert sorted(ours.row_N.tolist()) == list(range(len(MIXED)))
    assert torch.equal(ours.row_N, theirs.row_N) and torch.equal(ours.label_N, theirs.label_N)
    difference_N = (ours.video_NTCHW.float() - theirs.video_NTCHW.float()).abs().mean((1, 2, 3, 4))
    assert difference_N.max() < 1.5, difference_N


def test_a_turned_clip_in_a_batch(mixed: Path) -> None:
    batch_of(mixed / "val.arrow", "torchcodec", np.arange(1))
    assert Manifest.open(mixed / "val.arrow").row(0).rotation == 270


def test_jpeg_frames_and_videos_give_the_same_batches(footage: dict[str, Path], tmp_path: Path) -> None:
    """Get the same rows, frames, crops and flips from JPEG frames as from videos; pixels differ only by JPEG's rounding."""
    for split, name in (("train", "bikes.mp4"), ("train", "carphone.mp4"), ("val", "cup.mp4")):
        stem = Path(name).stem
        for kind in ("videos", "frames"):
            (tmp_path / kind / split / "any").mkdir(parents=True, exist_ok=True)
        path = cut(footage[name], tmp_path / "videos" / split / "any" / f"{stem}.mp4", "-c", "copy", "-frames:v", "40")
        folder = tmp_path / "frames" / split / "any" / stem
        folder.mkdir()
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0), start=1):
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                image.save(folder / f"{number:05d}.jpg", quality=95, subsampling=0)
    for kind in ("videos", "frames"):
        assert prepare.main(["folder", "--root", str(tmp_path / kind), "--workers", "0"]) == 0
    assert Manifest.open(tmp_path / "frames" / "train.arrow").row(0).codec == JPEG_FRAMES
    # Four epochs.
    positions = np.arange(8)
    videos = batch_of(tmp_path / "videos" / "train.arrow", "pyav", positions)
    frames = batch_of(tmp_path / "frames" / "train.arrow", "pyav", positions)
    assert torch.equal(videos.row_N, frames.row_N)
    difference_N = (videos.video_NTCHW.float() - frames.video_NTCHW.float()).abs().mean((1, 2, 3, 4))
    assert 0 < difference_N.max() < 2, difference_N

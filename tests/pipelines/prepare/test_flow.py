"""Compute optical flow with prepare.py: known motions, the same clips as the source, interrupted and failing writes."""

import csv
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import prepare
from pipelines.clip_names import clip_names
from pipelines.decoding.clip_bytes import image_bytes
from pipelines.jpeg_clips import JPEG_FLOW
from pipelines.manifest import Manifest, ManifestRow, image_file
from pipelines.prepare.errors import DataSetError
from pipelines.prepare.flow.compute_flow import clip_stem
from pipelines.prepare.flow.flow_clip import flow_size
from pipelines.prepare.flow.optical_flow import METHODS, flow_estimator, require_method, to_displacement, to_levels
from pipelines.prepare.shapes import drawing
from tests.helpers.clips import turned, with_matrix, write_frames, write_video
from tests.helpers.small_disk import mounted

CHECKOUT = Path(__file__).resolve().parents[3]
FRAMES = 6
needs_opencv = pytest.mark.usefixtures("opencv")


@pytest.fixture(scope="module")
def opencv() -> None:
    pytest.importorskip("cv2", reason="OpenCV is of the extra flow: make dev installs it")


def texture(height: int, width: int, seed: int = 0) -> NDArray[np.float64]:
    """Return a smooth random texture_HW of 0 to 1: noise without its high frequencies."""
    noise_HW = np.random.default_rng(seed).standard_normal((height, width))
    y_H1, x_1W = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    smooth_HW = np.fft.ifft2(np.fft.fft2(noise_HW) * np.exp(-200 * (y_H1**2 + x_1W**2))).real
    return (smooth_HW - smooth_HW.min()) / np.ptp(smooth_HW)


def moving_video(moves: list[tuple[int, int]], height: int = 96, width: int = 128, seed: int = 0) -> NDArray[np.uint8]:
    """Return a video_THWC of a texture that moves by (x, y) pixels, to the right and down, from each frame to the next."""
    margin = 32
    texture_HW = texture(height + 2 * margin, width + 2 * margin, seed)
    frames, left, top = [], margin, margin
    for x, y in [(0, 0), *moves]:
        # The texture moves to the right when the window moves to the left.
        left, top = left - x, top - y
        frames.append(texture_HW[top : top + height, left : left + width])
    grey_THW1 = np.rint(255 * np.stack(frames))[..., None].astype(np.uint8)
    return np.repeat(grey_THW1, 3, axis=-1)


def flow(root: Path, target: Path, *options: str) -> int:
    return prepare.main(["flow", "--root", str(root), "--to", str(target), "--workers", "0", *options])


def rows_of(root: Path, split: str = "train") -> list[ManifestRow]:
    manifest = Manifest.open(root / f"{split}.arrow")
    return [manifest.row(number) for number in range(len(manifest))]


def read_flow(root: Path, row: ManifestRow) -> NDArray[np.float32]:
    """Read displacement_THW2 of a clip in files."""
    files = [image_file(root / row.path, row, image) for image in range(row.num_images)]
    levels = [np.asarray(Image.open(path)) for path in files]
    assert all(level_HW.ndim == 2 for level_HW in levels)
    return to_displacement(np.stack([np.stack(levels[0::2]), np.stack(levels[1::2])], -1))


def medians(flow_THW2: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the median displacement_T2 far from the border."""
    return np.median(flow_THW2[:, 16:-16, 16:-16], axis=(1, 2))


# --- Known motion -----------------------------------------------------------------------------------------------------


def test_levels() -> None:
    pixels = np.array([-30, -20, -10, 0, 10, 20, 30], np.float32)
    assert to_levels(pixels).tolist() == [0, 0, 64, 128, 191, 255, 255]
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_levels(to_displacement(every)), every)
    some = np.random.default_rng(0).uniform(-20, 20, 1000).astype(np.float32)
    assert np.abs(to_displacement(to_levels(some)) - some).max() <= 20 / 255 + 1e-5


@needs_opencv
@pytest.mark.parametrize("method", METHODS)
def test_a_known_translation(method: str) -> None:
    """Give x to the right and y down, of the first frame's pixels."""
    first_HWC, second_HWC = moving_video([(3, -2)])
    flow_HW2 = flow_estimator(method, 96)(first_HWC[..., 0].copy(), second_HWC[..., 0].copy())
    assert medians(flow_HW2[None])[0] == pytest.approx([3, -2], abs=0.1)


@needs_opencv
@pytest.mark.parametrize("method", METHODS)
def test_mirrored_frames_have_mirrored_flow(method: str) -> None:
    """Negate x and reverse the columns, which is 255 minus the level: what a mirrored flow clip does in training."""
    estimate = flow_estimator(method, 96)
    first_HW, second_HW = (np.ascontiguousarray(image_HWC[..., 0]) for image_HWC in moving_video([(4, 2)]))
    flow_HW2 = estimate(first_HW, second_HW)
    mirrored_HW2 = estimate(*(np.ascontiguousarray(image_HW[:, ::-1]) for image_HW in (first_HW, second_HW)))
    expected_HW2 = flow_HW2[:, ::-1] * np.array([-1, 1], np.float32)
    assert np.median(np.abs(mirrored_HW2 - expected_HW2)[16:-16, 16:-16]) < 0.05
    levels_HW, expected_HW = to_levels(mirrored_HW2[..., 0]), 255 - to_levels(flow_HW2[:, ::-1, 0])
    assert np.median(np.abs(levels_HW.astype(int) - expected_HW)[16:-16, 16:-16]) <= 1


@needs_opencv
@pytest.mark.parametrize("label", range(4))
def test_moves_of_the_shapes(label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the moves to the right, left, down and up within half a pixel, in the median over the shapes' pixels."""
    size, frames, pair, tracks = 64, 24, drawing.PAIRS[label // 2], list[drawing.Track]()

    def recorded(rng: np.random.Generator, progress_T: NDArray[np.float64]) -> drawing.Track:
        tracks.append(pair.track(rng, progress_T))
        return tracks[-1]

    monkeypatch.setattr(drawing, "PAIRS", [replace(each, track=recorded) for each in drawing.PAIRS])
    pixel_HW2 = (np.indices((size, size))[::-1].transpose(1, 2, 0) + 0.5) / size
    estimate, error_N = flow_estimator("dis", size), []
    for index in range(label, 50, 10):
        grey_THW = np.rint(drawing.draw_clip("train", 0, index, size, (frames,)) @ [0.299, 0.587, 0.114]).astype(
            np.uint8
        )
        track = tracks.pop()
        place_T2 = np.stack([track.x_T, track.y_T], -1)[:: -1 if label % 2 else 1]
        for first in range(0, frames - 1, 3):
            true_2 = size * (place_T2[first + 1] - place_T2[first])
            assert np.abs(true_2).max() > 1
            flow_HW2 = to_displacement(to_levels(estimate(grey_THW[first], grey_THW[first + 1])))
            in_shape_2HW = np.moveaxis((pixel_HW2 - place_T2[first]) / track.radius_T[0], -1, 0)
            error_N.append(np.linalg.norm(flow_HW2 - true_2, axis=-1)[pair.shape(*in_shape_2HW) < 0])
    assert np.median(np.concatenate(error_N)) < 0.5, drawing.CLASSES[label]


# --- The same clips ---------------------------------------------------------------------------------------------------

# Clips of this motion, but for those whose name says otherwise.
MOVE = (3, -2)


@pytest.fixture(scope="module")
def source(opencv: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of videos and folders of frames, upright, turned and mirrored, all of one motion before they are turned."""
    root = tmp_path_factory.mktemp("source")
    steady = moving_video([MOVE] * (FRAMES - 1))
    for split in ("train", "val"):
        write_video(root / split / "a" / "plain.mp4", steady)
        write_frames(root / split / "b" / "frames", steady, first=0)
    write_frames(root / "train" / "b" / "jump", moving_video([(0, 0), (0, 0), (5, 1), (0, 0), (0, 0)]), "img_%05d.jpg")
    turned(write_video(root / "train" / "b" / "turned.mp4", steady), 90)
    with_matrix(write_video(root / "train" / "b" / "mirrored.mp4", steady), (-1, 0, 0, 1))
    assert prepare.main(["folder", "--root", str(root), "--workers", "0"]) == 0
    return root


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flow of `source`."""
    target = tmp_path_factory.mktemp("made") / "flow"
    assert flow(source, target) == 0
    return target


def images_in(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for split in ("train", "val")
        for path in sorted((root / split).rglob("*.jpg"))
    }


def test_rows_are_those_of_the_source(source: Path, made: Path) -> None:
    for split, paths in (
        ("train", ["a/plain", "b/frames", "b/jump", "b/mirrored", "b/turned"]),
        ("val", ["a/plain", "b/frames"]),
    ):
        old, new = Manifest.open(source / f"{split}.arrow"), Manifest.open(made / f"{split}.arrow")
        assert (old.classes, old.order_groups, old.split) == (new.classes, new.order_groups, new.split)
        assert [row.path for row in rows_of(made, split)] == [f"{split}/{path}/flow_{{xy}}_%05d.jpg" for path in paths]
        for before, after in zip(rows_of(source, split), rows_of(made, split), strict=True):
            assert (before.label, before.num_frames - 1) == (after.label, after.num_frames)
            assert (after.codec, after.offset, after.rotation, after.mirrored) == (JPEG_FLOW, 1, 0, False)
            assert (after.width, after.height) == before.upright_size
            files = sorted(path.name for path in (made / after.path).parent.iterdir())
            assert files == [f"flow_{xy}_{number:05d}.jpg" for xy in "xy" for number in range(1, FRAMES)]
            assert after.length == sum(path.stat().st_size for path in (made / after.path).parent.iterdir())


def test_upright_frames_and_their_order(made: Path) -> None:
    """Compute flow i from frame i to frame i + 1, as they are shown."""
    x, y = MOVE
    expected = {
        "plain": [(x, y)] * 5,
        "frames": [(x, y)] * 5,
        "jump": [(0, 0), (0, 0), (5, 1), (0, 0), (0, 0)],
        "mirrored": [(-x, y)] * 5,
        # Clockwise: what moved to the right moves down, and what moved down moves to the left.
        "turned": [(-y, x)] * 5,
    }
    found = {Path(row.path).parent.name: medians(read_flow(made, row)) for row in rows_of(made)}
    assert found.keys() == expected.keys()
    for name, moves in expected.items():
        assert found[name] == pytest.approx(np.array(moves), abs=0.2), name


def test_from_shards_and_into_shards(source: Path, made: Path, tmp_path: Path) -> None:
    packed = ["--shard-size", "50KB", "--workers", "0"]
    assert prepare.main(["shard", "--root", str(source), "--to", str(tmp_path / "packed"), *packed]) == 0
    assert flow(tmp_path / "packed", tmp_path / "flow") == 0
    assert images_in(tmp_path / "flow") == images_in(made)
    names = [clip_names(Manifest.open(root / "train.arrow")) for root in (source, made, tmp_path / "flow")]
    assert names[0] is not None and names == [names[0]] * 3
    assert prepare.main(["shard", "--root", str(made), "--to", str(tmp_path / "end"), *packed]) == 0
    for root in (made, tmp_path / "end"):
        assert prepare.main(["verify", "--root", str(root), "--decode", "--workers", "0"]) == 0


def test_a_tar_file_for_each_clip(source: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Write the images of the folders to one file per clip, from which `shard` makes the same shards."""
    target = tmp_path / "tars"
    assert flow(source, target, "--tar") == 0
    assert sorted(path.name for path in (target / "train").rglob("*") if path.is_file()) == [
        "frames.tar", "jump.tar", "mirrored.tar", "plain.tar", "turned.tar"
    ]  # fmt: skip
    for of_files, of_tar in zip(rows_of(made), rows_of(target), strict=True):
        assert replace(of_tar, path=of_files.path, offset=1, length=of_files.length) == of_files
        for image in range(of_tar.num_images):
            assert image_bytes(target, of_tar, image)[1] == image_bytes(made, of_files, image)[1]
    for root in (target, made):
        packed = ["--to", str(tmp_path / f"{root.name} packed"), "--shard-size", "20KB", "--workers", "0"]
        assert prepare.main(["shard", "--root", str(root), *packed]) == 0
    shards = [
        {path.name: path.read_bytes() for path in tmp_path.glob(f"{root.name} packed/*.tar")} for root in (target, made)
    ]
    assert shards[0] == shards[1] and len(shards[0]) > 2
    whole = (target / "val" / "a" / "plain.tar").read_bytes()
    for damaged in (whole[:600], whole[:-2000]):
        (target / "val" / "a" / "plain.tar").write_bytes(damaged)
        assert flow(source, target, "--tar") == 0
        assert (target / "val" / "a" / "plain.tar").read_bytes() == whole
    capsys.readouterr()
    assert flow(source, target, "--tar") == 0
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("width", "height", "rotation", "size"),
    [
        (340, 256, 0, (340, 256)),
        (1920, 1080, 0, (455, 256)),
        (1080, 1920, 0, (256, 455)),
        (1920, 1080, 90, (256, 455)),
        (133, 100, 0, (133, 100)),
        (100, 133, 270, (133, 100)),
    ],
)
def test_sizes(width: int, height: int, rotation: int, size: tuple[int, int]) -> None:
    assert flow_size(ManifestRow("c.mp4", 0, 1, 0, 8, "h264", width, height, rotation)) == size


@pytest.mark.parametrize(
    ("path", "codec", "name", "stem"),
    [
        ("videos/a.b.webm", "vp9", "", "videos/a.b"),
        ("v1/1/%05d.jpg", "jpeg-frames", "", "v1/1"),
        ("../store/v1/1.webm", "vp9", "", "store/v1/1"),
        ("/store/v1/1.webm", "vp9", "", "store/v1/1"),
        ("val-000000.tar", "vp9", "../store/v1/1", "store/v1/1"),
        # Shards of an older version.
        ("val-000000.tar", "vp9", "", "val/000001/000001234"),
    ],
)
def test_names_of_clips(path: str, codec: str, name: str, stem: str) -> None:
    assert clip_stem("val", ManifestRow(path, 0, 1, 0, 8, codec, 8, 8, 0, name=name), 1234) == stem


# --- What cannot be computed ------------------------------------------------------------------------------------------


def reasons(root: Path) -> dict[str, str]:
    with open(root / "bad_files.csv", newline="") as file:
        return {record["path"]: record["reason"] for record in csv.DictReader(file)}


def test_clips_that_fail_are_left_out_and_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled = Path(shutil.copytree(source, tmp_path / "spoiled"))
    write_frames(spoiled / "train" / "b" / "single", moving_video([]))
    assert prepare.main(["folder", "--root", str(spoiled), "--workers", "0"]) == 0
    (spoiled / "train" / "b" / "jump" / "img_00004.jpg").write_bytes(b"no image")
    (spoiled / "train" / "b" / "turned.mp4").unlink()
    target = tmp_path / "flow"
    assert flow(spoiled, target) == 2
    assert "train: 3 of 6 clips cannot be decoded, more than the limit of 5.00%" in capsys.readouterr().err
    assert not list(target.glob("*.arrow")) and not list(target.rglob("*.tmp"))
    assert flow(spoiled, target, "--max-bad", "0.5") == 0
    said = capsys.readouterr().out
    assert "3 of 6 clips, 3 BAD (50.00%), 15 pairs of frames" in said and "LEFT OUT: 3 clips" in said
    assert [Path(row.path).parent.name for row in rows_of(target)] == ["plain", "frames", "mirrored"]
    found = reasons(target)
    assert "img_00004.jpg: not a JPEG file" in found["train/b/jump/img_%05d.jpg"]
    assert "has one frame, and optical flow needs two" in found["train/b/single/%05d.jpg"]
    assert "No such file" in found["train/b/turned.mp4"]


def test_two_clips_of_one_name(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = Path(shutil.copytree(source, tmp_path / "twice"))
    shutil.copy(twice / "train" / "a" / "plain.mp4", twice / "train" / "a" / "plain.mkv")
    assert prepare.main(["folder", "--root", str(twice), "--workers", "0"]) == 0
    assert flow(twice, tmp_path / "flow") == 2
    assert "clip train/a/plain would be in the folder of another clip. Fix: rename" in capsys.readouterr().err
    assert not (tmp_path / "flow").exists()


def test_flow_of_flow(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flow(made, tmp_path / "flow") == 2
    assert "its clips are optical flow. Fix: give the folder of the RGB clips" in capsys.readouterr().err


def test_frames_that_are_too_small_for_opencv(opencv: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        write_frames(tmp_path / "small" / split / "a" / "0", moving_video([(0, 0)], 6, 6))
    assert prepare.main(["folder", "--root", str(tmp_path / "small"), "--workers", "0"]) == 0
    assert flow(tmp_path / "small", tmp_path / "flow") == 2
    assert "OpenCV's dis cannot work on 6x6 pixels" in capsys.readouterr().err


def test_without_opencv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert flow(tmp_path / "any", tmp_path / "flow") == 2
    error = capsys.readouterr().err
    assert "optical flow needs OpenCV" in error
    assert "Fix: pip install -c constraints.txt opencv-contrib-python-headless" in error


def test_without_the_contrib_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", object())
    require_method("dis")
    with pytest.raises(DataSetError, match=r"lacks TV-L1.*Fix: pip uninstall opencv-python"):
        require_method("tvl1")


# --- Interrupted and failing writes -----------------------------------------------------------------------------------


def test_what_is_finished_is_left_alone(source: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.jpg")}
    assert flow(source, made) == 0
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*.jpg")}
    assert flow(source, made, "--method", "tvl1") == 2
    assert "was made from other manifests or with other options" in capsys.readouterr().err


def test_parts_make_the_same(source: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (3, 1, 2):
        assert not (tmp_path / "parts" / "train.arrow").exists()
        assert flow(source, tmp_path / "parts", "--part", f"{number}/3") == 0
    assert images_in(tmp_path / "parts") == images_in(made)
    assert (tmp_path / "parts" / "train.arrow").read_bytes() == (made / "train.arrow").read_bytes()
    said = capsys.readouterr()
    left = (
        r"1 computed in .*; 6 clips are left for other parts or a later call, \d+\.\d KB per clip, about \S+ MB in all"
    )
    assert re.search(left, said.out)
    assert re.search(r"flow: 3 of 3 clips, \d+\.\d KB per clip, about", said.err)


def test_an_incomplete_clip_is_made_again(source: Path, made: Path, tmp_path: Path) -> None:
    """Notice a folder whose files are gone or empty, as after a power loss."""
    target = Path(shutil.copytree(made, tmp_path / "flow"))
    (target / "train" / "a" / "plain" / "flow_y_00005.jpg").unlink()
    (target / "val" / "b" / "frames" / "flow_x_00001.jpg").write_bytes(b"")
    assert flow(source, target) == 0
    assert images_in(target) == images_in(made)


@pytest.mark.slow
def test_killed_and_started_again(opencv: None, tmp_path: Path) -> None:
    """Resume after SIGKILL with the result of an uninterrupted call."""
    root, target = tmp_path / "many", tmp_path / "killed"
    for number in range(15):
        write_video(root / "train" / "a" / f"{number:02d}.mp4", moving_video([(1, 0)] * 24, seed=number))
    shutil.copytree(root / "train", root / "val")
    assert prepare.main(["folder", "--root", str(root), "--workers", "0"]) == 0
    assert flow(root, tmp_path / "whole") == 0
    command = [sys.executable, "prepare.py", "flow", "--root", str(root), "--to", str(target), "--workers", "2"]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 60
    while count_clips(target) < 4 and time.monotonic() < deadline_s:
        time.sleep(0.005)
    process.kill()
    process.wait()
    # The workers notice that their parent is gone.
    time.sleep(0.5)
    assert 4 <= count_clips(target) < 30 and not (target / "train.arrow").exists()
    subprocess.run(command, cwd=CHECKOUT, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert images_in(target) == images_in(tmp_path / "whole")
    assert (target / "val.arrow").read_bytes() == (tmp_path / "whole" / "val.arrow").read_bytes()


def count_clips(target: Path) -> int:
    return sum(entry.suffix != ".tmp" for split in ("train", "val") for entry in (target / split).glob("a/*"))


def test_a_full_disk(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path / "disk", "40k") as disk:
        assert flow(source, disk / "flow") == 2
        error = capsys.readouterr().err
        assert "No space left on device. Fix: free space there" in error and "flow/train/" in error
        assert not list(disk.rglob("*.tmp"))

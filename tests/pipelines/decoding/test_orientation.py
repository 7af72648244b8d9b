"""Frames come upright in all 8 orientations that a display matrix can ask for, or the clip is bad."""

import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.decoding.decode import decode_clip
from pipelines.errors import BadClip
from pipelines.jpeg_clips import JPEG_FRAMES
from pipelines.loading.dali_batches import IMAGES, EncodedSource
from pipelines.loading.dali_graph import make_pipeline, samples_of
from pipelines.manifest import Manifest, ManifestRow, write_manifest
from pipelines.prepare.repack.rescale import scaled_images, scaled_size
from pipelines.prepare.scan.frame_folders import scan_frames
from pipelines.prepare.scan.scan_clip import scan_clip
from tests.helpers.clips import smooth_video, with_matrix, write_frames, write_video

MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", smooth_video(3), options={"crf": "5"})


def shown(stored_HWC: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Put each stored pixel (x, y) where the matrix says (ISO 14496-12, 6.2.2): at a x + c y, b x + d y."""
    a, b, c, d = matrix
    y_HW, x_HW = np.mgrid[: stored_HWC.shape[0], : stored_HWC.shape[1]]
    across_HW, down_HW = a * x_HW + c * y_HW, b * x_HW + d * y_HW
    across_HW, down_HW = across_HW - across_HW.min(), down_HW - down_HW.min()
    image_HWC = np.zeros((down_HW.max() + 1, across_HW.max() + 1, 3), stored_HWC.dtype)
    image_HWC[down_HW, across_HW] = stored_HWC
    return image_HWC


@pytest.mark.parametrize("matrix", MATRICES)
def test_each_orientation(clip: Path, tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    stored_HWC = decode_clip("pyav", clip.parent, row_of(clip), np.array([1]))[0].permute(1, 2, 0).numpy()
    expected_HWC = shown(stored_HWC, matrix)
    path = with_matrix(Path(shutil.copy(clip, tmp_path / "turned.mp4")), matrix)
    row = row_of(path)
    height, width = expected_HWC.shape[:2]
    assert row.upright_size == (width, height)
    # torchcodec does not mirror, so such a clip is PyAV's.
    assert row.fast_seek is not row.mirrored
    for decoder in ("pyav", "torchcodec"):
        image_CHW = decode_clip(decoder, tmp_path, row, np.array([1]))[0]
        assert np.array_equal(image_CHW.permute(1, 2, 0).numpy(), expected_HWC)
    transcoded = list(scaled_images(tmp_path, row, scaled_size(row, 999)))[1]
    assert np.abs(transcoded.astype(int) - expected_HWC).mean() < 1


def row_of(path: Path) -> ManifestRow:
    return ManifestRow(path.name, 0, label=0, **asdict(scan_clip(path)))


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg program: apt-get install ffmpeg")
@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (0, 1, 1, 0), (0, -2, 2, 0)])
def test_ffmpeg_shows_the_same(clip: Path, tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = with_matrix(Path(shutil.copy(clip, tmp_path / "turned.mp4")), matrix)
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    video_TCHW = decode_clip("pyav", tmp_path, row_of(path), np.arange(3))
    expected = np.frombuffer(raw, np.uint8).reshape(video_TCHW.permute(0, 2, 3, 1).shape)
    assert np.abs(video_TCHW.permute(0, 2, 3, 1).numpy().astype(int) - expected).mean() < 1


@pytest.mark.parametrize("matrix", [(1, 0, 0, 0.5), (0.7, 0.7, -0.7, 0.7), (1, 0, 0.3, 1), (0, 0, 0, 0), (1, 1, 0, 0)])
def test_other_matrices_make_a_bad_clip(clip: Path, tmp_path: Path, matrix: tuple[float, ...]) -> None:
    path = with_matrix(Path(shutil.copy(clip, tmp_path / "bent.mp4")), matrix)
    with pytest.raises(BadClip, match="is not one of the 8 of quarter turns and mirroring"):
        scan_clip(path)


# --- JPEG frames ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sideways(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of one clip of JPEG frames whose EXIF data say that they are to be turned."""
    folder = write_frames(tmp_path_factory.mktemp("exif") / "clip", smooth_video(3))
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in folder.iterdir():
        with Image.open(path) as image:
            image.save(path, exif=exif, quality=95)
    series, facts = scan_frames(folder)
    path = folder.parent / "train.arrow"
    write_manifest(path, [ManifestRow(f"clip/{series.pattern}", series.first, label=0, **asdict(facts))], ["a"])
    return path


def test_an_exif_orientation_is_ignored(sideways: Path) -> None:
    """Decode JPEG frames as they are stored, as the official code does with Pillow."""
    row = Manifest.open(sideways).row(0)
    assert (row.upright_size, row.fast_seek) == ((64, 48), None)
    image_CHW = decode_clip("pyav", sideways.parent, row, np.array([1]))[0]
    with Image.open(sideways.parent / "clip/00002.jpg") as image:
        assert image.getexif()[0x0112] == 6
        expected_HWC = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(image_CHW.permute(1, 2, 0).numpy() - expected_HWC).mean() < 1


def test_dali_ignores_it_too(sideways: Path) -> None:
    pytest.importorskip("nvidia.dali")
    manifest = Manifest.open(sideways)
    clip = EncodedSource(sideways, "pyav", feed=IMAGES, codecs=frozenset([JPEG_FRAMES])).one_frame(manifest.row(0), 0)
    samples = samples_of(IMAGES, [clip], [clip.parts])
    images, _ = make_pipeline(IMAGES, torch.device("cpu"), 1, 1, lambda: samples).run()
    image_CHW = decode_clip("pyav", sideways.parent, manifest.row(0), np.array([0]))[0]
    assert np.abs(np.array(images.at(0)).astype(int) - image_CHW.permute(1, 2, 0).numpy()).mean() < 2

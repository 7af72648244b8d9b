"""Batches of optical flow: channels, the mirror, worker processes, shards, DALI, and clips that are damaged."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import prepare
from pipelines.decoding import shard_reader
from pipelines.decoding.decode import decode_clip
from pipelines.jpeg_clips import JPEG_FLOW, JPEG_FLOW_RG
from pipelines.loading.clips import ClipBatch, ClipSource, EvaluationClips, TrainingClips, invert_x, stack_segments
from pipelines.loading.worker_loader import ClipLoader, start_worker_server
from pipelines.manifest import Manifest, ManifestRow, write_manifest
from pipelines.prepare.scan.flow_folders import scan_flow
from pipelines.stream.augmentation import Augmentation, replacement_row, sample_training_params
from pipelines.stream.eval_views import EvalProtocol, evaluation_views
from pipelines.stream.order import StreamOrder
from tests.helpers.clips import smooth_flow, write_flow

CLIPS, SEED, SEGMENTS = 6, 3, 4
AUGMENTATION = Augmentation(SEGMENTS, 32, crop_scales=(1.0, 0.875, 0.75), flip="on", modality="flow")
PROTOCOL = EvalProtocol(SEGMENTS, 32, "twice", crops=10, modality="flow")
NAMES = {JPEG_FLOW: "flow_{xy}_%05d.jpg", JPEG_FLOW_RG: "%06d.jpg"}


def write_clips(folder: Path, codec: str = JPEG_FLOW) -> Path:
    """Write clips of 7 to 22 flow fields of two sizes, and their manifest."""
    rows = []
    for number in range(CLIPS):
        flow_F2HW = smooth_flow(7 + 3 * number, 40, 48 + 16 * (number % 2), seed=number)
        series, facts = scan_flow(write_flow(folder / str(number), flow_F2HW, NAMES[codec]), codec)
        rows.append(ManifestRow(f"{number}/{series.pattern}", series.first, label=number % 2, **asdict(facts)))
    write_manifest(folder / "train.arrow", rows, ["a", "b"])
    return folder / "train.arrow"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("flow"))


@pytest.fixture(autouse=True)
def _closed_shards() -> Iterator[None]:
    yield
    shard_reader.close_shards()


def training(manifest: Path, augmentation: Augmentation = AUGMENTATION) -> TrainingClips:
    return TrainingClips(ClipSource(manifest, "pyav"), augmentation, SEED)


def evaluation(manifest: Path, protocol: EvalProtocol = PROTOCOL) -> EvaluationClips:
    return EvaluationClips(ClipSource(manifest, "pyav"), protocol)


def check_equal(one: ClipBatch, other: ClipBatch) -> None:
    for name in ("video_NTCHW", "label_N", "row_N", "real_N"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.bad_clips == other.bad_clips


def images_of(manifest: Path, row: int, frame_T: np.ndarray) -> Tensor:
    """Read x1 y1 x2 y2 ... of these flow fields with Pillow, uint8 (2 * T, H, W)."""
    files = [f"flow_{component}_{frame + 1:05d}.jpg" for frame in frame_T.tolist() for component in "xy"]
    return torch.stack([torch.from_numpy(np.array(Image.open(manifest.parent / str(row) / name))) for name in files])


# --- Pixels -------------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_official_channels(manifest: Path) -> None:
    """Give x1 y1 ... x5 y5 of each segment as the files have them, cropped, and in mirrored clips x inverted."""
    augmentation = replace(AUGMENTATION, size=20, crop_scales=(0.5,))
    batch = training(manifest, augmentation)[np.arange(2 * CLIPS)]
    assert batch.video_NTCHW.shape == (2 * CLIPS, SEGMENTS, 10, 20, 20) and batch.video_NTCHW.dtype == torch.uint8
    flips = set()
    for epoch, row, video_TCHW in zip(
        *StreamOrder(CLIPS, SEED).at(np.arange(2 * CLIPS)), batch.video_NTCHW, strict=True
    ):
        entry = Manifest.open(manifest).row(int(row))
        params = sample_training_params(augmentation, entry.num_frames, *entry.upright_size, SEED, int(epoch), int(row))
        images = images_of(manifest, int(row), params.frame_T)
        crop = images[:, params.top : params.top + 20, params.left : params.left + 20].unflatten(0, (SEGMENTS, 10))
        if params.flip:
            crop = crop.flip(-1).clone()
            crop[:, [0, 2, 4, 6, 8]] = 255 - crop[:, [0, 2, 4, 6, 8]]
        assert torch.equal(video_TCHW, crop)
        flips.add(params.flip)
    assert flips == {False, True}


def test_mirroring_twice_gives_the_clip(manifest: Path) -> None:
    flow_FCHW = decode_clip("pyav", manifest.parent, Manifest.open(manifest).row(0), np.arange(5))
    once = stack_segments(flow_FCHW.flip(-1), mirrored=True)
    assert not torch.equal(once, stack_segments(flow_FCHW))
    twice = once.flip(-1)
    invert_x(twice)
    assert torch.equal(twice, stack_segments(flow_FCHW))


def test_stacking_leaves_rgb_as_it_is() -> None:
    video_TCHW = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    assert stack_segments(video_TCHW, mirrored=True) is video_TCHW


def test_views_of_an_evaluation(manifest: Path) -> None:
    """Give crops of the scaled flow fields; every second view is the mirror image of the view before it."""
    batch = evaluation(manifest)[np.array([1]), np.array([True])]
    entry = Manifest.open(manifest).row(1)
    views = evaluation_views(PROTOCOL, entry.num_frames, *entry.upright_size)
    assert batch.video_NTCHW.shape == (20, SEGMENTS, 10, 32, 32) and len(views) == 20
    for plain, mirrored in batch.video_NTCHW.unflatten(0, (10, 2)):
        back = mirrored.flip(-1)
        invert_x(back)
        assert torch.equal(back, plain)
    assert not torch.equal(batch.video_NTCHW[0], batch.video_NTCHW[10])


def test_a_colour_image_has_x_in_red_and_y_in_green(tmp_path: Path, manifest: Path) -> None:
    """Decode Something-Something v2's form nearly to the same values: JPEG rounds colours."""
    colour = write_clips(tmp_path, JPEG_FLOW_RG)
    frame_T = np.array([0, 3, 3, 6])
    one, other = (decode_clip("pyav", path.parent, Manifest.open(path).row(0), frame_T) for path in (colour, manifest))
    assert one.shape == other.shape == (4, 2, 40, 48)
    assert (one.float() - other.float()).abs().mean() < 3
    assert training(colour)[np.arange(3)].video_NTCHW.shape == (3, SEGMENTS, 10, 32, 32)


# --- Loaders ------------------------------------------------------------------------------------------------------------


def test_workers_give_the_batches_of_this_process(manifest: Path) -> None:
    start_worker_server()
    indices = [np.arange(0, 3), np.arange(3, 8)]
    for one, other in zip(
        ClipLoader(training(manifest), 1, 2).batches(indices),
        ClipLoader(training(manifest), 0, 2).batches(indices),
        strict=True,
    ):
        check_equal(one, other)


def test_ranks_share_the_clips_of_one_process(manifest: Path) -> None:
    """Give each slot of a global batch the same clip, whichever rank holds it."""
    whole = training(manifest)[np.arange(8)]
    parts = [training(manifest)[np.arange(rank, 8, 2)] for rank in range(2)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.video_NTCHW, whole.video_NTCHW[rank::2])
        assert torch.equal(part.row_N, whole.row_N[rank::2])


@pytest.mark.parametrize("codec", [JPEG_FLOW, JPEG_FLOW_RG])
def test_shards_give_the_batches_of_the_files(tmp_path: Path, codec: str) -> None:
    files, shards = write_clips(tmp_path / "files", codec), tmp_path / "shards"
    command = ["shard", "--root", str(files.parent), "--to", str(shards), "--shard-size", "60KB", "--workers", "0"]
    assert prepare.main(command) == 0 and len(list(shards.glob("*.tar"))) > 1
    assert prepare.main(["verify", "--root", str(shards), "--workers", "0", "--decode"]) == 0
    check_equal(training(shards / "train.arrow")[np.arange(8)], training(files)[np.arange(8)])
    rows = np.arange(CLIPS), np.ones(CLIPS, bool)
    check_equal(evaluation(shards / "train.arrow")[rows], evaluation(files)[rows])


def test_staged_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_clips(tmp_path / "files")
    expected = training(files)[np.arange(6)]
    staged = tmp_path / "staged"
    assert prepare.main(["stage", "--root", str(files.parent), "--to", str(staged), "--workers", "0"]) == 0
    assert len(list(staged.rglob("flow_y_*.jpg"))) == sum(7 + 3 * number for number in range(CLIPS))
    for path in files.parent.rglob("*.jpg"):
        path.unlink()
    monkeypatch.setenv("TSM_STAGED_FILES", str(staged))
    check_equal(training(files)[np.arange(6)], expected)


# --- Damage -------------------------------------------------------------------------------------------------------------


def test_bad_clips_are_replaced_in_training_and_missing_in_evaluation(tmp_path: Path) -> None:
    manifest = write_clips(tmp_path)
    (tmp_path / "2" / "flow_y_00001.jpg").unlink()
    (tmp_path / "2" / "flow_y_00007.jpg").unlink()
    for path in (tmp_path / "4").glob("flow_y_*.jpg"):
        Image.new("L", (8, 8)).save(path)
    batch = training(manifest)[np.arange(CLIPS)]
    _, row_N = StreamOrder(CLIPS, SEED).at(np.arange(CLIPS))
    assert {record.row for record in batch.bad_clips} >= {4}
    for record in batch.bad_clips:
        slot = row_N.tolist().index(record.row) if record.row in row_N else None
        assert slot is None or record.replaced_by == replacement_row(CLIPS, SEED, 0, record.row, 0)
    reasons = " ".join(record.reason for record in batch.bad_clips)
    assert "flow_y_0" in reasons and "8x8, but 48x40 when the manifest was made" in reasons
    clips = evaluation(manifest, replace(PROTOCOL, crops=1))
    found = clips[np.arange(CLIPS), np.ones(CLIPS, bool)]
    assert found.real_N.tolist() == [True, True, False, True, False, True]
    assert found.video_NTCHW.shape == (CLIPS * 2, SEGMENTS, 10, 32, 32) and not found.video_NTCHW[8:10].any()

"""Batches of clips after frames of other clips, read in this process and by workers; bad clips."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.loading.clips import ClipBatch, ClipSource, TrainingClips, crop_frames, resize_frames
from pipelines.loading.worker_loader import ClipLoader, start_worker_server
from pipelines.stream.augmentation import (
    Augmentation,
    SampleParams,
    burn_in_row,
    replacement_row,
    sample_burn_in_params,
    sample_training_params,
)
from pipelines.stream.burn_in import StreamSampling
from pipelines.stream.order import StreamOrder
from tests.helpers.clips import write_clips

CLIPS, FRAMES, WIDTH, HEIGHT, SEED, BURN_IN = 6, 12, 48, 40, 3, 3
AUGMENTATION = Augmentation(
    num_frames=4,
    size=32,
    sampling="stream",
    flip="on",
    stream=StreamSampling(burn_in=BURN_IN, distances=(1, 2, 3), loss_from=2),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a manifest of six clips of noise."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    write_clips(
        folder / "train.arrow",
        (rng.integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(CLIPS)),
    )
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "clips"))


def training_clips(folder: Path) -> TrainingClips:
    return TrainingClips(ClipSource(folder / "train.arrow", "pyav"), AUGMENTATION, SEED)


def batches(folder: Path, workers: int = 0) -> Iterator[ClipBatch]:
    """Yield the clips of two epochs, in batches of three."""
    return ClipLoader(training_clips(folder), workers, 2).batches(np.arange(2 * CLIPS).reshape(-1, 3))


def slots() -> list[tuple[int, int]]:
    """List (epoch, row) of the clips of two epochs."""
    return list(zip(*(part.tolist() for part in StreamOrder(CLIPS, SEED).at(np.arange(2 * CLIPS))), strict=True))


def pixels(folder: Path, row: int, params: SampleParams) -> torch.Tensor:
    source = training_clips(folder).source
    return resize_frames(crop_frames(source._frames(source.manifest.row(row), params.frame_T), params), 32, 32)


def test_frames_of_another_clip_come_before_those_of_the_clip(made: Path) -> None:
    video_NTCHW = torch.cat([batch.video_NTCHW for batch in batches(made)])
    label_N = torch.cat([batch.label_N for batch in batches(made)])
    burn_in_label_N = torch.cat([batch.burn_in_label_N for batch in batches(made) if batch.burn_in_label_N is not None])
    row_N = torch.cat([batch.row_N for batch in batches(made)])
    assert video_NTCHW.shape == (2 * CLIPS, BURN_IN + 4, 3, 32, 32)
    for (epoch, row), video_TCHW in zip(slots(), video_NTCHW, strict=True):
        other = burn_in_row(CLIPS, SEED, epoch, row)
        clip = FRAMES, WIDTH, HEIGHT, SEED, epoch, row
        before = sample_burn_in_params(AUGMENTATION, *clip, other)
        assert torch.equal(video_TCHW[:BURN_IN], pixels(made, other, before))
        assert torch.equal(video_TCHW[BURN_IN:], pixels(made, row, sample_training_params(AUGMENTATION, *clip)))
    assert row_N.tolist() == [row for _, row in slots()]
    assert label_N.tolist() == [row % 3 for _, row in slots()]
    assert burn_in_label_N.tolist() == [burn_in_row(CLIPS, SEED, epoch, row) % 3 for epoch, row in slots()]


def test_workers_give_the_batches_that_this_process_gives(made: Path) -> None:
    start_worker_server()
    for ours, theirs in zip(batches(made, workers=2), batches(made), strict=True):
        assert torch.equal(ours.video_NTCHW, theirs.video_NTCHW)
        assert torch.equal(ours.label_N, theirs.label_N)


def test_a_broken_burn_in_is_replaced_by_the_rule_and_recorded(folder: Path) -> None:
    broken = 2
    os.truncate(folder / f"{broken}.mp4", 100)
    expected_records, whole = [], list(batches(folder))
    for epoch, row in slots():
        first = row
        for attempt in range(10):
            if row != broken:
                break
            row = replacement_row(CLIPS, SEED, epoch, first, attempt)
            expected_records.append((broken, epoch, row))
        other = first_other = burn_in_row(CLIPS, SEED, epoch, row)
        for attempt in range(10):
            if other != broken:
                break
            other = replacement_row(CLIPS, SEED, epoch, first_other, attempt)
            expected_records.append((broken, epoch, other))
    records = [(bad.row, bad.epoch, bad.replaced_by) for batch in whole for bad in batch.bad_clips]
    assert records == expected_records
    # More than as a clip of each epoch.
    assert len(records) > 2
    assert all(batch.real_N.all() for batch in whole)
    assert broken not in torch.cat([batch.row_N for batch in whole]).tolist()

"""Stream sampling: the frames of a clip and of the burn-in before it are pure functions of seed, epoch and row."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.stream.augmentation import (
    Augmentation,
    SampleParams,
    burn_in_row,
    sample_burn_in_params,
    sample_training_params,
)
from pipelines.stream.burn_in import StreamSampling, other_row, stream_training

STREAM = StreamSampling(burn_in=8, distances=(1, 2, 3, 4, 5), loss_from=3)
AUGMENTATION = Augmentation(num_frames=8, size=224, sampling="stream", flip="on", stream=STREAM)
UNIFORM = st.floats(0, 1, exclude_max=True)


def training(row: int, num_frames: int = 100, augmentation: Augmentation = AUGMENTATION) -> SampleParams:
    return sample_training_params(augmentation, num_frames, 340, 256, 0, 0, row)


def burn_in(row: int, other: int, num_frames: int = 100) -> SampleParams:
    return sample_burn_in_params(AUGMENTATION, num_frames, 340, 256, 0, 0, row, other)


def distance_of(params: SampleParams) -> int:
    (distance,) = set(np.diff(params.frame_T).tolist())
    return int(distance)


@given(num_frames=st.integers(1, 500), count=st.integers(1, 32), distance=st.integers(1, 40), uniform=UNIFORM)
@settings(max_examples=150)
def test_frames_lie_in_the_clip_at_the_distance_if_it_fits(
    num_frames: int, count: int, distance: int, uniform: float
) -> None:
    frame_T = stream_training(num_frames, count, distance, uniform)
    assert frame_T.dtype == np.int64
    assert 0 <= frame_T.min() <= frame_T.max() < num_frames
    if count > 1 and num_frames >= count:
        (found,) = set(np.diff(frame_T).tolist())
        # The largest distance that fits, up to the sampled one.
        assert found == min(distance, (num_frames - 1) // (count - 1))


def test_every_phase_is_sampled() -> None:
    starts = {int(stream_training(24, 8, 3, number / 100)[0]) for number in range(100)}
    assert starts == {0, 1, 2}
    assert stream_training(24, 8, 5, 0.0).tolist() == [0, 3, 6, 9, 12, 15, 18, 21]


def test_a_clip_of_too_few_frames_repeats_its_last_one() -> None:
    assert stream_training(3, 5, 4, 0.9).tolist() == [0, 1, 2, 2, 2]


def test_distances_are_those_of_the_settings_alike() -> None:
    counts = np.bincount([distance_of(training(row)) for row in range(2000)])
    assert len(counts) == 6 and counts[0] == 0
    # The expected count is 400.
    assert min(counts[1:]) > 320


def test_the_burn_in_has_the_distance_of_its_clip_and_frames_of_its_own() -> None:
    pairs = [(training(row), burn_in(row, 7)) for row in range(200)]
    assert all(distance_of(clip) == distance_of(before) for clip, before in pairs)
    phases = np.array([(clip.frame_T[0], before.frame_T[0]) for clip, before in pairs if distance_of(clip) == 1])
    assert abs(np.corrcoef(phases.T)[0, 1]) < 0.5
    # A short clip has the distance that fits it.
    assert {distance_of(burn_in(row, 7, num_frames=16)) for row in range(50)} == {1, 2}


@given(rows=st.integers(2, 10_000), row=st.integers(0, 9_999), uniform=UNIFORM)
@settings(max_examples=100)
def test_the_burn_in_is_another_clip(rows: int, row: int, uniform: float) -> None:
    other = other_row(rows, row % rows, uniform)
    assert 0 <= other < rows
    assert other != row % rows


def test_every_other_clip_may_be_the_burn_in() -> None:
    assert {burn_in_row(5, 0, epoch, 2) for epoch in range(60)} == {0, 1, 3, 4}
    assert burn_in_row(1, 0, 0, 0) == 0


def test_seed_epoch_and_row_each_matter() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({burn_in_row(1 << 40, *key) for key in keys}) == 4
    augmentation = replace(AUGMENTATION, stream=replace(STREAM, distances=tuple(range(1, 1001))))
    frames = {tuple(sample_training_params(augmentation, 100_000, 340, 256, *key).frame_T.tolist()) for key in keys}
    assert len(frames) == 4


def test_crop_and_flip_are_those_of_the_other_samplings() -> None:
    plain = replace(AUGMENTATION, sampling="uniform", stream=None)
    for row in range(50):
        ours, theirs = vars(training(row)), vars(training(row, augmentation=plain))
        assert {key: ours[key] for key in ours if key != "frame_T"} == {
            key: theirs[key] for key in theirs if key != "frame_T"
        }


def test_golden_stream_samples() -> None:
    """Keep the sampled frames and clips: a change would alter every resumed run."""
    assert [burn_in_row(239_781, 42, 0, row) for row in range(3)] == [48729, 17659, 61524]
    assert [training(row).frame_T.tolist() for row in range(2)] == [
        [83, 85, 87, 89, 91, 93, 95, 97],
        [36, 40, 44, 48, 52, 56, 60, 64],
    ]
    assert [burn_in(row, 7).frame_T.tolist() for row in range(2)] == [
        [40, 42, 44, 46, 48, 50, 52, 54],
        [67, 71, 75, 79, 83, 87, 91, 95],
    ]

"""Sample frames and crops: an independent version of the official rules, and the key that determines a sample."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.stream.augmentation import (
    Augmentation,
    SampleParams,
    dropout_seeds,
    replacement_row,
    sample_training_params,
)
from pipelines.stream.frame_sampling import EVALUATION_RULES, TRAINING_RULES, dense_training, uniform_training

AUGMENTATION = Augmentation(num_frames=8, size=224, flip="on")
SIDES = st.integers(2, 700)
LENGTHS = st.integers(1, 2000)

# --- Frames -----------------------------------------------------------------------------------------------------------


def official_uniform_training(num_frames: int, segments: int, randint_T: list[int]) -> list[int]:
    """Return the official frames: with `d = N // S`, `s * d + randint(d)` for each segment s if d > 0, else zeros.

    The official code's other case, N > S, cannot occur with d = 0.
    """
    d = num_frames // segments
    return [s * d + randint for s, randint in enumerate(randint_T)] if d > 0 else [0] * segments


def official_dense(num_frames: int, segments: int, start: int) -> list[int]:
    return [(s * (64 // segments) + start) % num_frames for s in range(segments)]


def official_evaluation(rule: str, num_frames: int, segments: int) -> list[list[int]]:
    """Return the official evaluation frames from Python arithmetic, with numpy's linspace for dense starts as there."""
    t = num_frames / float(segments)
    middle = [int(t / 2.0 + t * s) for s in range(segments)]
    if rule == "uniform_validation":
        return [middle if num_frames > segments else [0] * segments]
    if rule == "uniform":
        return [middle]
    if rule == "twice":
        return [middle, [int(t * s) for s in range(segments)]]
    positions = max(1, 1 + num_frames - 64)
    if rule == "dense":
        return [official_dense(num_frames, segments, start) for start in np.linspace(0, positions - 1, 10, dtype=int)]
    # The official code samples this start; this project takes the middle.
    return [official_dense(num_frames, segments, (positions - 1) // 2)]


@given(num_frames=LENGTHS, segments=st.integers(1, 64), seed=st.integers(0, 1000))
@settings(max_examples=100)
def test_uniform_training_frames_are_the_official_ones(num_frames: int, segments: int, seed: int) -> None:
    uniform_T = np.random.default_rng(seed).random(segments)
    randint_T = [int(uniform * (num_frames // segments)) for uniform in uniform_T]
    expected = official_uniform_training(num_frames, segments, randint_T)
    assert uniform_training(num_frames, segments, uniform_T).tolist() == expected


@given(num_frames=LENGTHS, segments=st.integers(1, 64), uniform=st.floats(0, 1, exclude_max=True))
@settings(max_examples=100)
def test_dense_training_frames_are_official_ones(num_frames: int, segments: int, uniform: float) -> None:
    """Sample one of the starts of the official `randint(0, P - 1)`, which excludes its upper end."""
    positions = max(1, 1 + num_frames - 64)
    frame_T = dense_training(num_frames, segments, np.full(segments, uniform)).tolist()
    start = 0 if positions == 1 else int(uniform * (positions - 1))
    assert 0 <= start < max(1, positions - 1)
    assert frame_T == official_dense(num_frames, segments, start)


def test_dense_training_samples_every_start_but_the_last() -> None:
    uniforms = np.linspace(0, 0.9999, 300)
    assert {int(dense_training(70, 8, np.array([uniform] * 8))[0]) for uniform in uniforms} == set(range(6))
    assert {int(dense_training(65, 8, np.array([uniform] * 8))[0]) for uniform in uniforms} == {0}


@given(rule=st.sampled_from(sorted(EVALUATION_RULES)), num_frames=LENGTHS, segments=st.integers(1, 64))
@settings(max_examples=300)
def test_evaluation_frames_are_the_official_ones(rule: str, num_frames: int, segments: int) -> None:
    assert EVALUATION_RULES[rule](num_frames, segments).tolist() == official_evaluation(rule, num_frames, segments)


# Worked out by hand from the official rules: clips shorter than, as long as and longer than 8 segments or a dense
# window.
EVALUATION_TABLE = [
    ("uniform_validation", 300, 8, [[18, 56, 93, 131, 168, 206, 243, 281]]),
    ("uniform_validation", 65, 8, [[4, 12, 20, 28, 36, 44, 52, 60]]),
    ("uniform_validation", 9, 8, [[0, 1, 2, 3, 5, 6, 7, 8]]),
    ("uniform_validation", 8, 8, [[0] * 8]),
    ("uniform_validation", 3, 8, [[0] * 8]),
    ("uniform_validation", 1, 8, [[0] * 8]),
    ("uniform_validation", 2, 1, [[1]]),
    ("uniform", 300, 8, [[18, 56, 93, 131, 168, 206, 243, 281]]),
    ("uniform", 9, 8, [[0, 1, 2, 3, 5, 6, 7, 8]]),
    ("uniform", 8, 8, [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("uniform", 3, 8, [[0, 0, 0, 1, 1, 2, 2, 2]]),
    ("uniform", 1, 8, [[0] * 8]),
    ("twice", 300, 8, [[18, 56, 93, 131, 168, 206, 243, 281], [0, 37, 75, 112, 150, 187, 225, 262]]),
    ("twice", 64, 8, [[4, 12, 20, 28, 36, 44, 52, 60], [0, 8, 16, 24, 32, 40, 48, 56]]),
    ("twice", 3, 8, [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2]]),
    ("dense", 64, 8, [[0, 8, 16, 24, 32, 40, 48, 56]] * 10),
    ("dense", 65, 8, [[0, 8, 16, 24, 32, 40, 48, 56]] * 9 + [[1, 9, 17, 25, 33, 41, 49, 57]]),
    ("dense", 20, 8, [[0, 8, 16, 4, 12, 0, 8, 16]] * 10),
    ("dense", 1, 8, [[0] * 8] * 10),
    ("dense", 300, 2, [[start, start + 32] for start in (0, 26, 52, 78, 104, 131, 157, 183, 209, 236)]),
    ("dense", 300, 16, [list(range(start, start + 64, 4)) for start in (0, 26, 52, 78, 104, 131, 157, 183, 209, 236)]),
    ("dense_validation", 300, 8, [[118, 126, 134, 142, 150, 158, 166, 174]]),
    ("dense_validation", 64, 4, [[0, 16, 32, 48]]),
    ("dense_validation", 5, 8, [[0, 3, 1, 4, 2, 0, 3, 1]]),
]


@pytest.mark.parametrize(("rule", "num_frames", "segments", "frame_VT"), EVALUATION_TABLE)
def test_evaluation_reference_values(rule: str, num_frames: int, segments: int, frame_VT: list[list[int]]) -> None:
    assert EVALUATION_RULES[rule](num_frames, segments).tolist() == frame_VT


# Rule, length, number of frames, sampled numbers, frames.
TRAINING_TABLE = [
    ("uniform", 300, 4, [0.0, 0.5, 0.99, 0.1], [0, 112, 224, 232]),
    ("uniform", 65, 4, [0.0, 0.5, 0.99, 0.1], [0, 24, 47, 49]),
    ("uniform", 9, 8, [0.9] * 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ("uniform", 8, 8, [0.9] * 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ("uniform", 7, 8, [0.9] * 8, [0] * 8),
    ("uniform", 1, 4, [0.9] * 4, [0] * 4),
    ("dense", 300, 4, [0.5, 0.0, 0.9, 0.9], [118, 134, 150, 166]),
    ("dense", 300, 4, [0.9999, 0.0, 0.9, 0.9], [235, 251, 267, 283]),
    ("dense", 65, 4, [0.9999] * 4, [0, 16, 32, 48]),
    ("dense", 64, 4, [0.9999] * 4, [0, 16, 32, 48]),
    ("dense", 40, 4, [0.9999] * 4, [0, 16, 32, 8]),
    ("dense", 1, 4, [0.9999] * 4, [0] * 4),
]


@pytest.mark.parametrize(("rule", "num_frames", "segments", "uniforms", "frame_T"), TRAINING_TABLE)
def test_training_reference_values(
    rule: str, num_frames: int, segments: int, uniforms: list[float], frame_T: list[int]
) -> None:
    assert TRAINING_RULES[rule](num_frames, segments, np.array(uniforms)).tolist() == frame_T


@given(rule=st.sampled_from(sorted(EVALUATION_RULES)), num_frames=LENGTHS, segments=st.integers(1, 64))
@settings(max_examples=200)
def test_evaluation_frames_lie_in_the_clip(rule: str, num_frames: int, segments: int) -> None:
    frame_VT = EVALUATION_RULES[rule](num_frames, segments)
    assert frame_VT.dtype == np.int64
    assert frame_VT.shape == ({"twice": 2, "dense": 10}.get(rule, 1), segments)
    assert 0 <= frame_VT.min() <= frame_VT.max() < num_frames
    if "dense" not in rule or num_frames >= 64:
        assert (np.diff(frame_VT, axis=1) >= 0).all()


@given(
    rule=st.sampled_from(sorted(TRAINING_RULES)),
    num_frames=st.integers(1, 500),
    uniforms=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=32),
)
@settings(max_examples=150)
def test_training_frames_lie_in_the_clip(rule: str, num_frames: int, uniforms: list[float]) -> None:
    frame_T = TRAINING_RULES[rule](num_frames, len(uniforms), np.array(uniforms))
    assert frame_T.dtype == np.int64
    assert 0 <= frame_T.min() <= frame_T.max() < num_frames
    if rule == "uniform" or num_frames >= 64:
        assert (np.diff(frame_T) >= 0).all()


def test_training_samples_reach_every_frame_of_a_segment() -> None:
    frames = {
        int(uniform_training(10, 2, np.array([uniform, uniform]))[1]) for uniform in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9999)
    }
    assert frames == {5, 6, 7, 8, 9}


# --- Crop and flip ----------------------------------------------------------------------------------------------------


def check_inside(params: SampleParams, width: int, height: int) -> None:
    """Check that a crop has at least one pixel and lies within the frame."""
    assert 1 <= params.width <= width
    assert 1 <= params.height <= height
    assert 0 <= params.left <= width - params.width
    assert 0 <= params.top <= height - params.height


@given(width=SIDES, height=SIDES, size=st.integers(1, 300), epoch=st.integers(0, 100), row=st.integers(0, 1000))
@settings(max_examples=150)
def test_training_crops_lie_in_the_frame(width: int, height: int, size: int, epoch: int, row: int) -> None:
    params = sample_training_params(replace(AUGMENTATION, size=size), 30, width, height, 0, epoch, row)
    check_inside(params, width, height)
    assert 0 <= params.frame_T.min() <= params.frame_T.max() < 30


@pytest.mark.parametrize("side", [1, 2])
def test_crops_of_the_smallest_frames_hold_a_pixel(side: int) -> None:
    for row in range(40):
        check_inside(sample_training_params(AUGMENTATION, 30, side, 40, 0, 0, row), side, 40)


def many(
    count: int, augmentation: Augmentation = AUGMENTATION, width: int = 340, height: int = 256
) -> list[SampleParams]:
    return [sample_training_params(augmentation, 100, width, height, 0, 0, row) for row in range(count)]


def test_crop_sizes_are_the_officials() -> None:
    """Sample the official crop sizes: base 256, scales 1, .875, .75, .66, with sides at most one scale step apart."""
    sides = [256, 224, 192, 168]
    expected = {(sides[i], sides[j]) for i in range(4) for j in range(4) if abs(i - j) <= 1}
    samples = many(1000)
    assert {(params.width, params.height) for params in samples} == expected
    counts = [sum((params.width, params.height) == pair for params in samples) for pair in expected]
    # The expected count is 100.
    assert min(counts) > 60


def test_a_side_near_the_networks_input_becomes_it() -> None:
    """Round a side near the network's input size to it: base 254 gives 222, two pixels from 224."""
    widths = {params.width for params in many(300, height=254)}
    assert 224 in widths
    assert 222 not in widths
    # A side that is five pixels off stays.
    assert 219 in {params.width for params in many(300, height=251)}


def test_a_frame_just_smaller_than_the_networks_input_is_not_exceeded() -> None:
    assert max(params.width for params in many(300, width=300, height=222)) == 222


def test_all_thirteen_offsets_are_hit() -> None:
    """Sample all 13 offsets, in quarters of the free space: corners, centre, edge centres and four points between."""
    samples = [
        params
        for params in many(3000, width=256 + 224, height=256 + 224)
        if (params.width, params.height) == (480, 480)
    ]
    assert {(params.left, params.top) for params in samples} == {(0, 0)}
    square = replace(AUGMENTATION, crop_scales=(0.5,))
    seen = {(params.left // 4, params.top // 4) for params in many(1000, square, 32, 32)}
    quarters = {(i, j) for i in range(5) for j in range(5)}
    official = {(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)}
    assert seen == official < quarters


def test_flip_is_a_fair_coin() -> None:
    # Five standard deviations.
    assert sum(params.flip for params in many(2000)) == pytest.approx(1000, abs=110)


def test_flip_is_off_unless_asked_for() -> None:
    assert not any(params.flip for params in many(200, Augmentation(8, 224)))


def test_flip_off_changes_nothing_else() -> None:
    for with_flip, without in zip(many(50), many(50, replace(AUGMENTATION, flip="off")), strict=True):
        assert values_of(replace(with_flip, flip=False)) == values_of(without)


def test_dense_sampling_changes_nothing_but_the_frames() -> None:
    for uniform, dense in zip(many(50), many(50, replace(AUGMENTATION, sampling="dense")), strict=True):
        assert values_of(uniform)[1:] == values_of(dense)[1:]
        assert np.diff(dense.frame_T).tolist() == [8] * 7


def test_relabelling_mirrors_the_same_clips() -> None:
    relabel = replace(AUGMENTATION, flip="relabel", mirrored_words=(("left", "right"),))
    assert [params.flip for params in many(50)] == [params.flip for params in many(50, relabel)]


def test_frames_crop_and_flip_are_drawn_apart() -> None:
    samples = many(4000)
    numbers = np.array(
        [[*params.frame_T, params.width, params.left / (341 - params.width), params.flip] for params in samples]
    )
    correlation = np.corrcoef(numbers.T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5 / 4000**0.5


# --- Keys of the sampled parameters -----------------------------------------------------------------------------------


def values_of(params: SampleParams) -> tuple[object, ...]:
    return (tuple(params.frame_T.tolist()), params.left, params.top, params.width, params.height, params.flip)


def test_golden_sample_params() -> None:
    """Keep the sampled parameters: a change would alter the crops of every resumed run."""
    golden = {
        (42, 0, 0): ((27, 69, 81, 140, 168, 197, 239, 280), 116, 16, 224, 224, True),
        (42, 0, 1): ((19, 45, 85, 133, 167, 217, 246, 292), 37, 16, 192, 192, True),
        (42, 1, 0): ((6, 50, 103, 145, 150, 214, 223, 283), 84, 0, 256, 224, True),
        (43, 0, 0): ((12, 67, 78, 140, 148, 218, 252, 274), 74, 88, 192, 168, False),
    }
    sampled = {key: values_of(sample_training_params(AUGMENTATION, 300, 340, 256, *key)) for key in golden}
    assert sampled == golden


@given(seed=st.integers(0, 1 << 40), epoch=st.integers(0, 1000), row=st.integers(0, 1 << 30))
@settings(max_examples=40)
def test_the_same_key_gives_the_same_draw(seed: int, epoch: int, row: int) -> None:
    first, second = (values_of(sample_training_params(AUGMENTATION, 300, 340, 256, seed, epoch, row)) for _ in range(2))
    assert first == second


@given(key=st.tuples(*[st.integers(0, 1000)] * 3), which=st.integers(0, 2))
@settings(max_examples=40)
def test_seed_epoch_and_row_each_matter(key: tuple[int, int, int], which: int) -> None:
    other = tuple(part + (index == which) for index, part in enumerate(key))
    seed, epoch, row = other
    first = sample_training_params(AUGMENTATION, 100_000, 340, 256, *key)
    assert values_of(first) != values_of(sample_training_params(AUGMENTATION, 100_000, 340, 256, seed, epoch, row))


@given(rows=st.integers(1, 10_000), key=st.tuples(*[st.integers(0, 1000)] * 4))
@settings(max_examples=60)
def test_replacements_lie_in_the_manifest_and_repeat(rows: int, key: tuple[int, int, int, int]) -> None:
    assert 0 <= replacement_row(rows, *key) < rows
    assert replacement_row(rows, *key) == replacement_row(rows, *key)


def test_golden_replacements() -> None:
    """Keep the replacement rows: a change would alter every resumed run that has met a broken clip."""
    assert [replacement_row(239_781, 42, 0, 5, attempt) for attempt in range(3)] == [176720, 40610, 152365]


def test_seed_epoch_row_and_attempt_of_a_replacement_each_matter() -> None:
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({replacement_row(1 << 40, *key) for key in keys}) == 5


def test_golden_dropout_seeds() -> None:
    """Keep the dropout seeds: a change would alter the masks of every resumed run."""
    golden = [5684778374870362375, 2170156266440264496, 3820435562263061999]
    assert dropout_seeds(42, 0, np.arange(3)).tolist() == golden


@given(seed=st.integers(0, 1 << 40), step=st.integers(0, 1 << 20), slots=st.lists(st.integers(0, 12_287), max_size=20))
@settings(max_examples=40)
def test_a_dropout_seed_belongs_to_its_slot(seed: int, step: int, slots: list[int]) -> None:
    seeds = dropout_seeds(seed, step, np.array(slots, dtype=np.int64))
    assert seeds.dtype == np.int64
    assert (seeds >= 0).all()
    assert seeds.tolist() == [int(dropout_seeds(seed, step, np.array([slot]))[0]) for slot in slots]


def test_seed_step_and_slot_of_dropout_each_matter() -> None:
    seeds = [dropout_seeds(seed, step, np.arange(100)) for seed in range(3) for step in range(3)]
    assert len(np.unique(np.concatenate(seeds))) == 900

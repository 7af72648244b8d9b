"""Which frames and which pixels: the official rules written anew, and what a draw depends on."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.draw import Augmentation, Draw, dropout_seeds, evaluation_draw, replacement_row, training_draw
from pipelines.sampling import uniform_centre, uniform_training

AUGMENTATION = Augmentation(num_frames=8, size=224, flip=True)
SIDES = st.integers(2, 700)

# --- Frames -----------------------------------------------------------------------------------------------------------


def official_training(num_frames: int, segments: int, randint_T: list[int]) -> list[int]:
    """`d = N // S`; d > 0: `s * d + randint(d)` for each segment s; else zeros (N > S cannot be with d = 0)."""
    d = num_frames // segments
    return [s * d + randint for s, randint in enumerate(randint_T)] if d > 0 else [0] * segments


def official_centre(num_frames: int, segments: int) -> list[int]:
    """`int(t / 2 + t * s)` with `t = N / S` where N > S; else zeros."""
    if num_frames > segments:
        t = num_frames / segments
        return [int(t / 2 + t * s) for s in range(segments)]
    return [0] * segments


@given(num_frames=st.integers(1, 2000), segments=st.integers(1, 64), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_training_frames_are_the_official_ones(num_frames: int, segments: int, seed: int) -> None:
    draw_T = np.random.default_rng(seed).random(segments)
    randint_T = [int(draw * (num_frames // segments)) for draw in draw_T]
    assert uniform_training(num_frames, segments, draw_T).tolist() == official_training(num_frames, segments, randint_T)


@given(num_frames=st.integers(1, 2000), segments=st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_evaluation_frames_are_the_official_ones(num_frames: int, segments: int) -> None:
    assert uniform_centre(num_frames, segments).tolist() == official_centre(num_frames, segments)


@pytest.mark.parametrize(
    ("num_frames", "segments", "frames"),
    [
        (300, 8, [18, 56, 93, 131, 168, 206, 243, 281]),
        (24, 8, [1, 4, 7, 10, 13, 16, 19, 22]),
        (9, 8, [0, 1, 2, 3, 5, 6, 7, 8]),
        (8, 8, [0] * 8),
        (3, 8, [0] * 8),
        (1, 1, [0]),
        (2, 1, [1]),
    ],
)
def test_evaluation_reference_values(num_frames: int, segments: int, frames: list[int]) -> None:
    assert uniform_centre(num_frames, segments).tolist() == frames


@given(
    num_frames=st.integers(1, 500),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=32),
)
@settings(max_examples=100, deadline=None)
def test_training_frames_lie_in_the_clip_and_in_order(num_frames: int, draws: list[float]) -> None:
    frame_T = uniform_training(num_frames, len(draws), np.array(draws))
    assert frame_T.dtype == np.int64
    assert frame_T[0] >= 0
    assert frame_T[-1] < num_frames
    assert (np.diff(frame_T) >= 0).all()


def test_training_draws_reach_every_frame_of_a_segment() -> None:
    frames = {int(uniform_training(10, 2, np.array([draw, draw]))[1]) for draw in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9999)}
    assert frames == {5, 6, 7, 8, 9}


# --- Crop and flip ----------------------------------------------------------------------------------------------------


def check_inside(draw: Draw, width: int, height: int) -> None:
    """At least a pixel, and none beyond the frame."""
    assert 1 <= draw.width <= width
    assert 1 <= draw.height <= height
    assert 0 <= draw.left <= width - draw.width
    assert 0 <= draw.top <= height - draw.height


@given(width=SIDES, height=SIDES, size=st.integers(1, 300), epoch=st.integers(0, 100), row=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_training_crops_lie_in_the_frame(width: int, height: int, size: int, epoch: int, row: int) -> None:
    draw = training_draw(replace(AUGMENTATION, size=size), 30, width, height, 0, epoch, row)
    check_inside(draw, width, height)
    assert 0 <= draw.frame_T.min() <= draw.frame_T.max() < 30


@given(width=SIDES, height=SIDES, scale=st.floats(0.3, 1.5))
@settings(max_examples=100, deadline=None)
def test_evaluation_crops_are_square_and_central(width: int, height: int, scale: float) -> None:
    draw = evaluation_draw(replace(AUGMENTATION, evaluation_scale=scale), 30, width, height)
    check_inside(draw, width, height)
    assert draw.width == draw.height
    assert draw.width == pytest.approx(min(scale, 1) * min(width, height), abs=0.5)
    assert abs(2 * draw.left + draw.width - width) <= 1
    assert abs(2 * draw.top + draw.height - height) <= 1


@pytest.mark.parametrize("side", [1, 2])
def test_crops_of_the_smallest_frames_hold_a_pixel(side: int) -> None:
    for row in range(40):
        check_inside(training_draw(AUGMENTATION, 30, side, 40, 0, 0, row), side, 40)
    check_inside(evaluation_draw(replace(AUGMENTATION, evaluation_scale=0.3), 30, side, 40), side, 40)


def test_evaluation_is_224_of_256_and_never_flipped() -> None:
    draw = evaluation_draw(AUGMENTATION, 24, 340, 256)
    assert (draw.left, draw.top, draw.width, draw.height, draw.flip) == (58, 16, 224, 224, False)
    assert draw.frame_T.tolist() == [1, 4, 7, 10, 13, 16, 19, 22]


def many(count: int, augmentation: Augmentation = AUGMENTATION, width: int = 340, height: int = 256) -> list[Draw]:
    return [training_draw(augmentation, 100, width, height, 0, 0, row) for row in range(count)]


def test_crop_sizes_are_the_officials() -> None:
    """Base 256: scales 1, .875, .75, .66; the two sides at most one step apart."""
    sides = [256, 224, 192, 168]
    expected = {(sides[i], sides[j]) for i in range(4) for j in range(4) if abs(i - j) <= 1}
    draws = many(1000)
    assert {(draw.width, draw.height) for draw in draws} == expected
    counts = [sum((draw.width, draw.height) == pair for draw in draws) for pair in expected]
    assert min(counts) > 60  # of 100 on the average


def test_a_side_near_the_networks_input_becomes_it() -> None:
    """Base 254: .875 of it is 222, two pixels from 224."""
    widths = {draw.width for draw in many(300, height=254)}
    assert 224 in widths
    assert 222 not in widths
    assert 219 in {draw.width for draw in many(300, height=251)}  # five pixels from it stay


def test_a_frame_just_smaller_than_the_networks_input_is_not_exceeded() -> None:
    assert max(draw.width for draw in many(300, width=300, height=222)) == 222


def test_all_thirteen_offsets_are_hit() -> None:
    """In quarters of the free space: corners, centre, middles of the edges, and four between."""
    draws = [draw for draw in many(3000, width=256 + 224, height=256 + 224) if (draw.width, draw.height) == (480, 480)]
    assert {(draw.left, draw.top) for draw in draws} == {(0, 0)}
    square = replace(AUGMENTATION, crop_scales=(0.5,))
    seen = {(draw.left // 4, draw.top // 4) for draw in many(1000, square, 32, 32)}
    quarters = {(i, j) for i in range(5) for j in range(5)}
    official = {(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)}
    assert seen == official < quarters


def test_flip_is_a_fair_coin() -> None:
    assert sum(draw.flip for draw in many(2000)) == pytest.approx(1000, abs=110)  # five deviations


def test_flip_is_off_unless_asked_for() -> None:
    assert not any(draw.flip for draw in many(200, Augmentation(8, 224)))


def test_flip_off_changes_nothing_else() -> None:
    for with_flip, without in zip(many(50), many(50, replace(AUGMENTATION, flip=False)), strict=True):
        assert values_of(replace(with_flip, flip=False)) == values_of(without)


def test_frames_crop_and_flip_are_drawn_apart() -> None:
    draws = many(4000)
    numbers = np.array([[*draw.frame_T, draw.width, draw.left / (341 - draw.width), draw.flip] for draw in draws])
    correlation = np.corrcoef(numbers.T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5 / 4000**0.5


# --- What a draw depends on -------------------------------------------------------------------------------------------


def values_of(draw: Draw) -> tuple[object, ...]:
    return (tuple(draw.frame_T.tolist()), draw.left, draw.top, draw.width, draw.height, draw.flip)


def test_golden_draws() -> None:
    """A change here breaks every resumed run: it would cut its clips otherwise."""
    golden = {
        (42, 0, 0): ((27, 69, 81, 140, 168, 197, 239, 280), 116, 16, 224, 224, True),
        (42, 0, 1): ((19, 45, 85, 133, 167, 217, 246, 292), 37, 16, 192, 192, True),
        (42, 1, 0): ((6, 50, 103, 145, 150, 214, 223, 283), 84, 0, 256, 224, True),
        (43, 0, 0): ((12, 67, 78, 140, 148, 218, 252, 274), 74, 88, 192, 168, False),
    }
    drawn = {key: values_of(training_draw(AUGMENTATION, 300, 340, 256, *key)) for key in golden}
    assert drawn == golden


@given(seed=st.integers(0, 1 << 40), epoch=st.integers(0, 1000), row=st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_the_same_key_gives_the_same_draw(seed: int, epoch: int, row: int) -> None:
    first, second = (values_of(training_draw(AUGMENTATION, 300, 340, 256, seed, epoch, row)) for _ in range(2))
    assert first == second


@given(key=st.tuples(*[st.integers(0, 1000)] * 3), which=st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_seed_epoch_and_row_each_matter(key: tuple[int, int, int], which: int) -> None:
    other = tuple(part + (index == which) for index, part in enumerate(key))
    seed, epoch, row = other
    first = training_draw(AUGMENTATION, 100_000, 340, 256, *key)
    assert values_of(first) != values_of(training_draw(AUGMENTATION, 100_000, 340, 256, seed, epoch, row))


@given(rows=st.integers(1, 10_000), key=st.tuples(*[st.integers(0, 1000)] * 4))
@settings(max_examples=60, deadline=None)
def test_replacements_lie_in_the_manifest_and_repeat(rows: int, key: tuple[int, int, int, int]) -> None:
    assert 0 <= replacement_row(rows, *key) < rows
    assert replacement_row(rows, *key) == replacement_row(rows, *key)


def test_golden_replacements() -> None:
    """A change here breaks every resumed run that met a broken clip."""
    assert [replacement_row(239_781, 42, 0, 5, attempt) for attempt in range(3)] == [176720, 40610, 152365]


def test_seed_epoch_row_and_attempt_of_a_replacement_each_matter() -> None:
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({replacement_row(1 << 40, *key) for key in keys}) == 5


def test_golden_dropout_seeds() -> None:
    """A change here breaks every resumed run: it would go on with other masks."""
    golden = [5684778374870362375, 2170156266440264496, 3820435562263061999]
    assert dropout_seeds(42, 0, np.arange(3)).tolist() == golden


@given(seed=st.integers(0, 1 << 40), step=st.integers(0, 1 << 20), slots=st.lists(st.integers(0, 12_287), max_size=20))
@settings(max_examples=40, deadline=None)
def test_a_dropout_seed_belongs_to_its_slot(seed: int, step: int, slots: list[int]) -> None:
    seeds = dropout_seeds(seed, step, np.array(slots, dtype=np.int64))
    assert seeds.dtype == np.int64
    assert (seeds >= 0).all()
    assert seeds.tolist() == [int(dropout_seeds(seed, step, np.array([slot]))[0]) for slot in slots]


def test_seed_step_and_slot_of_dropout_each_matter() -> None:
    seeds = [dropout_seeds(seed, step, np.arange(100)) for seed in range(3) for step in range(3)]
    assert len(np.unique(np.concatenate(seeds))) == 900

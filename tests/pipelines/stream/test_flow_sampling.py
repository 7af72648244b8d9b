"""Sample segments of several frames (optical flow): the official rules, written down a second time, with frames counted from 1."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.stream.augmentation import Augmentation, sample_training_params
from pipelines.stream.eval_views import EvalProtocol, evaluation_views
from pipelines.stream.frame_sampling import EVALUATION_RULES, TRAINING_RULES, uniform_training, with_following
from pipelines.stream.modality import CHANNELS_PER_FRAME, FRAMES_PER_SEGMENT, channels_of

LENGTHS, SEGMENTS, L = st.integers(1, 400), st.integers(1, 32), st.integers(1, 7)


def official_training(num_frames: int, segments: int, length: int, randint: list[int]) -> list[int]:
    """Return the official first frames; `randint`: the numbers that numpy would give, below d or below N - L + 1."""
    d = (num_frames - length + 1) // segments
    if d > 0:
        return [s * d + randint[s] + 1 for s in range(segments)]
    if num_frames > segments:
        return [number + 1 for number in sorted(randint)]
    return [1] * segments


def official_evaluation(rule: str, num_frames: int, segments: int, length: int) -> list[list[int]]:
    """Return the official first frames of each view; for dense validation the window in the middle."""
    tick = (num_frames - length + 1) / float(segments)
    middle = [int(tick / 2.0 + tick * x) + 1 for x in range(segments)]
    if rule == "uniform_validation":
        return [middle if num_frames > segments + length - 1 else [1] * segments]
    if rule == "uniform":
        return [middle]
    if rule == "twice":
        return [middle, [int(tick * x) + 1 for x in range(segments)]]
    sample_pos = max(1, 1 + num_frames - 64)
    starts = np.linspace(0, sample_pos - 1, num=10, dtype=int).tolist() if rule == "dense" else [(sample_pos - 1) // 2]
    return [[(x * (64 // segments) + start) % num_frames + 1 for x in range(segments)] for start in starts]


def official_read(first: list[int], num_frames: int, length: int) -> list[int]:
    """Return the frames that the official loader reads from these first frames on, here counted from 0."""
    read = []
    for frame in first:
        for _ in range(length):
            read.append(frame - 1)
            if frame < num_frames:
                frame += 1
    return read


@given(rule=st.sampled_from(sorted(EVALUATION_RULES)), num_frames=LENGTHS, segments=SEGMENTS, length=L)
@settings(max_examples=400, deadline=None)
def test_evaluation_frames_are_the_official_ones(rule: str, num_frames: int, segments: int, length: int) -> None:
    first_VT = EVALUATION_RULES[rule](num_frames, segments, length)
    expected = official_evaluation(rule, num_frames, segments, length)
    if num_frames < length:
        # The official code asks for files that do not exist.
        assert 0 <= first_VT.min() <= first_VT.max() < num_frames
        expected = [[max(1, frame) for frame in view] for view in expected]
    assert (first_VT + 1).tolist() == expected
    frame_VT = with_following(first_VT, num_frames, length)
    assert frame_VT.tolist() == [official_read(view, num_frames, length) for view in expected]


@given(num_frames=LENGTHS, segments=SEGMENTS, length=L, seed=st.integers(0, 1000))
@settings(max_examples=300, deadline=None)
def test_uniform_training_frames_are_official_ones(num_frames: int, segments: int, length: int, seed: int) -> None:
    uniform_T = np.random.default_rng(seed).random(segments)
    starts = num_frames - length + 1
    below = starts // segments if starts // segments > 0 else starts
    first_T = uniform_training(num_frames, segments, uniform_T, length)
    if below > 0:
        randint = [int(uniform * below) for uniform in uniform_T]
        expected = official_training(num_frames, segments, length, randint)
    else:
        # numpy would raise where a clip of fewer than L frames has more frames than segments.
        expected = [1] * segments
    assert (first_T + 1).tolist() == expected
    frame_T = with_following(first_T, num_frames, length)
    assert frame_T.tolist() == official_read(expected, num_frames, length)
    # Only a clip that is too short, or has no more frames than segments, repeats its last frame.
    if starts > 0 and (starts >= segments or num_frames > segments):
        assert (np.diff(frame_T.reshape(segments, length)) == 1).all()


@pytest.mark.parametrize(("num_frames", "segments", "length"), [(6, 3, 5), (7, 4, 5), (8, 6, 5), (9, 5, 7)])
def test_sorted_draws_have_the_official_distribution(num_frames: int, segments: int, length: int) -> None:
    """Sort independent draws, each of all first frames: every combination of equally likely numbers gives the official counts."""
    starts = num_frames - length + 1
    assert starts // segments == 0 and num_frames > segments
    equally_likely = (np.arange(starts) + 0.5) / starts
    ours = Counter(
        tuple(uniform_training(num_frames, segments, np.array(uniform_T), length).tolist())
        for uniform_T in product(equally_likely, repeat=segments)
    )
    assert ours == Counter(tuple(sorted(draws)) for draws in product(range(starts), repeat=segments))
    assert len({first for firsts in ours for first in firsts}) == starts


def test_rgb_never_gets_to_the_sorted_draws() -> None:
    """With L = 1 a clip of more frames than segments has d > 0, so the rule for RGB is the one before flow was added."""
    for num_frames, segments in product(range(1, 80), range(1, 40)):
        uniform_T = np.linspace(0, 0.999, segments)
        d = num_frames // segments
        expected = [s * d + int(uniform_T[s] * d) if d else 0 for s in range(segments)]
        assert uniform_training(num_frames, segments, uniform_T).tolist() == expected


# From the rules by hand: rule, flow fields, segments, the first and the last frame of each view's segments.
BY_HAND = [
    ("uniform_validation", 12, 8, [[0] * 8]),
    ("uniform_validation", 13, 8, [[0, 1, 2, 3, 5, 6, 7, 8]]),
    ("uniform_validation", 44, 8, [[2, 7, 12, 17, 22, 27, 32, 37]]),
    ("uniform", 12, 8, [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("uniform", 5, 8, [[0] * 8]),
    ("twice", 44, 8, [[2, 7, 12, 17, 22, 27, 32, 37], [0, 5, 10, 15, 20, 25, 30, 35]]),
    ("dense_validation", 20, 8, [[0, 8, 16, 4, 12, 0, 8, 16]]),
]


@pytest.mark.parametrize(("rule", "num_frames", "segments", "first_VT"), BY_HAND)
def test_reference_values(rule: str, num_frames: int, segments: int, first_VT: list[list[int]]) -> None:
    assert EVALUATION_RULES[rule](num_frames, segments, 5).tolist() == first_VT


def test_the_last_frame_is_repeated_at_the_end() -> None:
    assert with_following(np.array([[0, 4], [17, 19]]), 20, 5).tolist() == [
        [0, 1, 2, 3, 4, 4, 5, 6, 7, 8],
        [17, 18, 19, 19, 19, 19, 19, 19, 19, 19],
    ]
    assert with_following(np.array([3, 7]), 20, 1).tolist() == [3, 7]


@pytest.mark.parametrize("sampling", sorted(TRAINING_RULES))
def test_a_flow_sample_has_the_crop_of_an_rgb_sample(sampling: str) -> None:
    """Give five flow fields per segment, and the crop and flip that RGB gets by the same key."""
    rgb = Augmentation(8, 224, sampling, flip="on")
    flow = Augmentation(8, 224, sampling, flip="on", modality="flow")
    for row in range(20):
        one, other = (sample_training_params(each, 80, 340, 256, 1, 2, row) for each in (rgb, flow))
        assert one.frame_T.shape == (8,) and other.frame_T.shape == (40,)
        assert (one.left, one.top, one.width, one.height, one.flip) == (
            other.left, other.top, other.width, other.height, other.flip,
        )  # fmt: skip


def test_a_golden_flow_sample() -> None:
    """Keep the sampled flow fields: a change would alter what a resumed run sees."""
    flow = Augmentation(4, 224, modality="flow")
    firsts = [sample_training_params(flow, length, 340, 256, 42, 0, 7).frame_T[::5].tolist() for length in (80, 7, 4)]
    assert firsts == [[9, 35, 53, 58], [0, 1, 2, 2], [0, 0, 0, 0]]


def test_views_of_flow() -> None:
    protocol = EvalProtocol(8, 224, "twice", crops=3, modality="flow")
    views = evaluation_views(protocol, 44, 340, 256)
    assert (protocol.views, protocol.channels, len(views)) == (6, 10, 6)
    assert views[0].frame_T.tolist() == [first + at for first in (2, 7, 12, 17, 22, 27, 32, 37) for at in range(5)]
    assert protocol.name == "8x224-flow-twice-3crop" and EvalProtocol(8, 224, "twice", 3).name == "8x224-twice-3crop"


def test_the_official_input_has_ten_channels() -> None:
    assert {modality: channels_of(modality) for modality in FRAMES_PER_SEGMENT} == {"rgb": 3, "flow": 10}
    assert CHANNELS_PER_FRAME.keys() == FRAMES_PER_SEGMENT.keys()

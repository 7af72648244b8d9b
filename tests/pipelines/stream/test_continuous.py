"""The circle of clips that a continuous evaluation shows, and the frames of a clip's beginnings."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.stream.continuous import CONTINUOUS_RULES, Shown, circle, frames_seen, lanes_of, rounds_of

GOLDEN_7 = [6, 4, 5, 1, 2, 3, 0]
GOLDEN_500 = [491, 217, 112, 340, 376, 0, 64, 498]


def test_golden_circle() -> None:
    """What precedes a clip is part of the protocol: another order would give other scores."""
    assert circle(1).tolist() == [0]
    assert circle(7).tolist() == GOLDEN_7
    assert circle(500)[:8].tolist() == GOLDEN_500


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    count=st.integers(1, 30),
    distance=st.integers(1, 5),
    burn_in_frames=st.integers(0, 40),
)
def test_lanes_show_the_circle(lengths: list[int], count: int, distance: int, burn_in_frames: int) -> None:
    """Each clip counts in one lane; each lane is a stretch of the circle, and begins with as few clips as are enough."""
    order = circle(len(lengths)).tolist()
    lanes = lanes_of(np.array(lengths), count, distance, burn_in_frames)
    assert [row for lane in lanes for row in lane.row_C[lane.burn_in :].tolist()] == order
    sizes = [len(lane.row_C) - lane.burn_in for lane in lanes]
    assert len(lanes) == min(count, len(lengths)) and max(sizes) - min(sizes) <= 1
    for lane in lanes:
        rows = lane.row_C.tolist()
        for row, following in itertools.pairwise(rows):
            assert order[(order.index(row) + 1) % len(order)] == following
        frames = [-(-lengths[row] // distance) for row in rows[: lane.burn_in]]
        assert sum(frames) >= burn_in_frames > sum(frames[1:]) or (lane.burn_in == 0 and burn_in_frames == 0)


def test_rounds_show_a_clip_of_each_lane_that_has_one() -> None:
    lanes = lanes_of(np.array([4, 4, 4, 4, 4]), 2, 2, 3)
    first, second = ([int(row) for row in lane.row_C] for lane in lanes)
    assert [lane.burn_in for lane in lanes] == [2, 2]
    assert (len(first), len(second)) == (4, 5)
    assert rounds_of(lanes) == [
        [Shown(0, first[0], False), Shown(1, second[0], False)],
        [Shown(0, first[1], False), Shown(1, second[1], False)],
        [Shown(0, first[2], True), Shown(1, second[2], True)],
        [Shown(0, first[3], True), Shown(1, second[3], True)],
        [Shown(1, second[4], True)],
    ]
    assert rounds_of([]) == []


@pytest.mark.parametrize(
    ("rule", "num_frames", "segments", "frame_VT"),
    [
        # Of 20 frames the first 2, 4, ... 20: the middle frame of each half of them.
        ("uniform_beginnings", 20, 2, [[part // 2, part + part // 2] for part in range(1, 11)]),
        # Of 5 frames the first 0.5, 1, 1.5 ..., rounded up.
        ("uniform_beginnings", 5, 1, [[0], [0], [1], [1], [1], [1], [2], [2], [2], [2]]),
        # A window of 64 repeats a shorter beginning from its first frame.
        ("dense_beginnings", 40, 2, [[0, 32 % seen] for seen in range(4, 41, 4)]),
        ("stream", 5, 8, [[0, 1, 2, 3, 4]]),
    ],
)
def test_frames_of_the_beginnings(rule: str, num_frames: int, segments: int, frame_VT: list[list[int]]) -> None:
    assert CONTINUOUS_RULES[rule](num_frames, segments).tolist() == frame_VT


def test_a_part_of_a_clip_is_rounded_up() -> None:
    assert [frames_seen(24, percent) for percent in (10, 20, 50, 90, 100)] == [3, 5, 12, 22, 24]
    assert frames_seen(1, 10) == 1

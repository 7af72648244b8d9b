"""Frames of a live source are chosen by their times: the trained distance on average, the nearest frame each time."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.stream.frame_clock import FrameClock


def taken(times_s: list[float], interval_s: float) -> list[int]:
    """Return the numbers of the frames that the clock takes."""
    clock, numbers = FrameClock(interval_s), []
    for number, time_s in enumerate(times_s):
        is_taken, clock = clock.at(time_s)
        if is_taken:
            numbers.append(number)
    return numbers


def constant(fps: float, count: int = 100, start_s: float = 0.0) -> list[float]:
    return [start_s + number / fps for number in range(count)]


RATES = st.sampled_from([5.0, 10.0, 12.0, 15.0, 24_000 / 1001, 25.0, 30_000 / 1001, 30.0, 50.0, 60.0])
STARTS = st.floats(0, 1e6)


@pytest.mark.parametrize("fps", [12.0, 25.0, 30_000 / 1001])
@given(every=st.integers(1, 12), start_s=STARTS)
@settings(max_examples=40)
def test_a_multiple_of_the_sources_distance_takes_every_nth_frame(fps: float, every: int, start_s: float) -> None:
    assert taken(constant(fps, 100, start_s), every / fps) == list(range(0, 100, every))


@given(fps=RATES, interval_s=st.floats(0.01, 1.0), start_s=STARTS)
@settings(max_examples=40)
def test_each_frame_taken_is_the_nearest_to_its_due_time(fps: float, interval_s: float, start_s: float) -> None:
    times_s = constant(fps, 100, start_s)
    numbers = taken(times_s, interval_s)
    rounding_s = 1e-6
    if interval_s * fps < 1:
        # The source is slower than the interval.
        assert numbers == list(range(100))
        return
    for order, number in enumerate(numbers):
        due_s = start_s + order * interval_s
        assert abs(times_s[number] - due_s) <= 0.5 / fps + rounding_s
    # None is left out at the end.
    assert start_s + len(numbers) * interval_s >= times_s[-1] - rounding_s


@given(gaps_s=st.lists(st.floats(0.0, 2.0), min_size=1, max_size=80), interval_s=st.floats(0.02, 1.0))
@settings(max_examples=40)
def test_any_times(gaps_s: list[float], interval_s: float) -> None:
    """Frames taken are a third of an interval apart or more, and no frame is held back for long: pauses included."""
    times_s = [0.0]
    for gap_s in gaps_s:
        times_s.append(times_s[-1] + gap_s)
    numbers = taken(times_s, interval_s)
    assert numbers[0] == 0
    for one, other in pairwise(numbers):
        assert times_s[other] - times_s[one] >= interval_s / 3 - 1e-9
    chosen = set(numbers)
    for number, time_s in enumerate(times_s):
        last_s = max(times_s[each] for each in chosen if each <= number)
        assert time_s - last_s <= 1.5 * interval_s + 1e-9


@given(cut=st.integers(1, 99), fps=RATES, interval_s=st.floats(0.02, 1.0))
@settings(max_examples=40)
def test_later_frames_change_nothing(cut: int, fps: float, interval_s: float) -> None:
    whole = taken(constant(fps), interval_s)
    assert taken(constant(fps)[:cut], interval_s) == [number for number in whole if number < cut]


def test_a_camera_that_falls_to_half_its_rate_keeps_the_distance_in_seconds() -> None:
    """30 frames/s, then 15: every sixth frame, then every third."""
    times_s = constant(30, 60) + constant(15, 30, start_s=2.0)
    assert taken(times_s, 0.2) == [*range(0, 60, 6), *range(60, 90, 3)]


def test_after_a_pause_no_frame_is_made_up_for() -> None:
    assert taken([0.0, 0.1, 0.2, 5.03, 5.13, 5.23], 0.1) == [0, 1, 2, 3, 4, 5]
    assert taken([0.0, 0.1, 5.03, 5.05, 5.07, 5.1], 0.1) == [0, 1, 2, 5]


def test_a_source_that_begins_again_begins_again() -> None:
    assert taken([7.0, 7.1, 7.2, 0.0, 0.1, 0.2], 0.2) == [0, 2, 3, 5]

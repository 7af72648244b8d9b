"""Learning-rate schedules agree with their closed forms."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.schedule import Decay, Schedule, scaled_rate

DECAYS: tuple[Decay, ...] = ("constant", "step", "cosine", "poly2")


def rates(schedule: Schedule) -> list[float]:
    return [schedule.learning_rate(step) for step in range(schedule.total_steps)]


@given(
    decay=st.sampled_from(DECAYS),
    warmup=st.integers(1, 50),
    start=st.floats(0, 0.5),
    peak=st.floats(0.6, 10),
)
@settings(max_examples=60)
def test_warm_up_is_linear_and_reaches_the_peak_right_behind_it(
    decay: Decay, warmup: int, start: float, peak: float
) -> None:
    schedule = Schedule(decay, peak, total_steps=100, warmup_steps=warmup, warmup_start=start, milestone_steps=(90,))
    rate = rates(schedule)[: warmup + 1]
    slopes = [after - before for before, after in zip([start, *rate], rate, strict=False)]
    assert slopes == pytest.approx([(peak - start) / (warmup + 1)] * (warmup + 1))
    assert min(slopes) > 0
    assert rate[-1] == pytest.approx(peak)


def test_warm_up_reference_values() -> None:
    schedule = Schedule("constant", peak=1.0, total_steps=10, warmup_steps=3, warmup_start=0.2)
    assert rates(schedule) == pytest.approx([0.4, 0.6, 0.8] + [1.0] * 7)


@pytest.mark.parametrize("decay", DECAYS)
def test_without_warm_up_the_first_step_has_the_peak(decay: Decay) -> None:
    assert Schedule(decay, peak=0.3, total_steps=10).learning_rate(0) == pytest.approx(0.3)


def test_constant_stays() -> None:
    assert set(rates(Schedule("constant", peak=0.3, total_steps=10, end=0.1))) == {0.3}


def test_milestones_multiply_from_their_own_step_on() -> None:
    schedule = Schedule("step", peak=1.0, total_steps=8, milestone_steps=(3, 6), factor=0.1)
    assert rates(schedule) == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_milestones_and_their_factor_are_free() -> None:
    schedule = Schedule("step", peak=1.0, total_steps=4, milestone_steps=(3, 1), factor=0.5)
    assert rates(schedule) == pytest.approx([1, 0.5, 0.5, 0.25])


@given(warmup=st.integers(0, 20), total=st.integers(21, 200), end=st.floats(0, 0.05), peak=st.floats(0.1, 10))
@settings(max_examples=60)
def test_cosine_is_half_a_wave(warmup: int, total: int, end: float, peak: float) -> None:
    schedule = Schedule("cosine", peak, total, warmup, end=end)
    for step in range(warmup, total + 1):
        angle = math.pi * (step - warmup) / (total - warmup)
        assert schedule.learning_rate(step) == pytest.approx((peak + end) / 2 + (peak - end) / 2 * math.cos(angle))


@given(warmup=st.integers(0, 20), total=st.integers(21, 200), end=st.floats(0, 0.05), peak=st.floats(0.1, 10))
@settings(max_examples=60)
def test_poly2_is_a_parabola(warmup: int, total: int, end: float, peak: float) -> None:
    schedule = Schedule("poly2", peak, total, warmup, end=end)
    for step in range(warmup, total + 1):
        left = (total - step) / (total - warmup)
        assert schedule.learning_rate(step) == pytest.approx(end + (peak - end) * left * left)


@pytest.mark.parametrize(("decay", "middle"), [("cosine", 0.55), ("poly2", 0.325)])
def test_decay_reference_values(decay: Decay, middle: float) -> None:
    """Decay from 1 to 0.1: the rate halfway and at the end."""
    schedule = Schedule(decay, peak=1.0, total_steps=100, end=0.1)
    assert schedule.learning_rate(50) == pytest.approx(middle)
    assert schedule.learning_rate(100) == pytest.approx(0.1)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_run_of_nothing_but_warm_up(decay: Decay) -> None:
    schedule = Schedule(decay, peak=1.0, total_steps=3, warmup_steps=3)
    assert rates(schedule) == pytest.approx([0.25, 0.5, 0.75])
    assert schedule.learning_rate(3) == pytest.approx(1.0)


@pytest.mark.parametrize(("scaling", "rate"), [("none", 0.02), ("linear", 1.92), ("sqrt", 0.02 * math.sqrt(96))])
def test_scaled_rate_of_the_published_batch(scaling: Any, rate: float) -> None:
    assert scaled_rate(0.02, 128, 12_288, scaling) == pytest.approx(rate)


@pytest.mark.parametrize("scaling", ["none", "linear", "sqrt"])
def test_the_base_batch_has_the_base_rate(scaling: Any) -> None:
    assert scaled_rate(0.02, 128, 128, scaling) == 0.02


@pytest.mark.parametrize("warmup", [-1, 11])
def test_a_warm_up_that_does_not_fit_is_refused(warmup: int) -> None:
    with pytest.raises(ValueError, match=f"warm-up of {warmup} steps does not fit into 10"):
        Schedule("cosine", 1.0, 10, warmup)


def test_an_unknown_decay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay must be one of .*'linear'"):
        Schedule("linear", 1.0, 10)  # type: ignore[arg-type]


# --- Published schedules ----------------------------------------------------------------------------------------------


def test_the_schedule_of_imagenet_in_an_hour() -> None:
    """Goyal et al., arXiv:1706.02677, 2.2 and 5.1: 0.1 per 256 images, batch 8,192, 5 warm-up epochs from 0.1, 90 in all."""
    steps = [round(epoch * 1_281_167 / 8_192) for epoch in (5, 30, 60, 80, 90)]
    assert steps == [782, 4_692, 9_384, 12_511, 14_075]
    warmup, *milestones, total = steps
    peak = scaled_rate(0.1, 256, 8_192, "linear")
    assert peak == pytest.approx(3.2)
    schedule = Schedule("step", peak, total, warmup, warmup_start=0.1, milestone_steps=tuple(milestones))
    assert schedule.learning_rate(0) == pytest.approx(0.1 + 3.1 / 783)
    assert schedule.learning_rate(390) == pytest.approx(0.1 + 3.1 * 391 / 783)
    at = {step: schedule.learning_rate(step) for step in (782, 4_691, 4_692, 9_383, 9_384, 12_510, 12_511, 14_074)}
    assert list(at.values()) == pytest.approx([3.2, 3.2, 0.32, 0.32, 0.032, 0.032, 0.0032, 0.0032])


def mlperf_rate(step: int, peak: float, end: float, warmup: int, total: int) -> float:
    """Rate of MLPerf's LARS reference (ResNet, polynomial decay with warm-up), with steps counted from 0 as there."""
    if step <= warmup:
        return peak * step / warmup
    left = 1 - max(step - warmup, 1) / (total - warmup + 1)
    return (peak - end) * left**2 + end


@pytest.mark.parametrize(("batch", "peak", "epochs"), [(12_288, 10.0, 5), (16_384, 25.0, 5), (32_768, 31.2, 25)])
def test_poly2_is_that_of_mlperf_within_a_step(batch: int, peak: float, epochs: int) -> None:
    warmup, total = (round(part * 1_281_167 / batch) for part in (epochs, 72))
    schedule = Schedule("poly2", peak, total, warmup, end=1e-4)
    for step in range(1, total):
        theirs = [mlperf_rate(near, peak, 1e-4, warmup, total) for near in (step - 1, step, step + 1)]
        assert min(theirs) - 1e-12 <= schedule.learning_rate(step) <= max(theirs) + 1e-12, step


def test_poly2_values_written_down() -> None:
    """Peak 25 after 100 of 1,100 steps, end 1e-4: a quarter remains at half of the decay, a hundredth at nine tenths."""
    schedule = Schedule("poly2", 25.0, 1_100, 100, end=1e-4)
    rate = [schedule.learning_rate(step) for step in (100, 600, 1_000, 1_100)]
    assert rate == pytest.approx([25.0, 6.250075, 0.250099, 1e-4], abs=1e-9)


@pytest.mark.parametrize("decay", DECAYS)
def test_no_rate_leaps_up(decay: Decay) -> None:
    """Rates grow by less than a tenth after 10 steps of warm-up, so velocities that include the rate need no correction."""
    schedule = Schedule(decay, 10.0, 1_951, 98, milestone_steps=(780, 1_561), end=1e-4 if decay != "constant" else 0.0)
    growth = [after / before for before, after in pairwise(rates(schedule))]
    assert growth[0] == pytest.approx(2.0)
    assert max(growth[10:]) < 1.1
    assert max(growth[98:]) <= 1.0

"""Log lines on input stalls: time, frequency and advice."""

import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.worlds import CHECKOUT
from training.telemetry.input_stalls import TOLERATED, WARM_UP_STEPS, ClipWorkers, InputStalls


def watch(*shares: float, steps: int = 20) -> list[str | None]:
    """Return the log line after each interval of 0.5 s steps that wait for these shares of it; 2 workers, 16 cores."""
    seen = InputStalls(ClipWorkers(2, 16))
    seen.add(WARM_UP_STEPS, 100.0, 99.0)
    return [seen.add(steps, steps * 0.5, share * steps * 0.5) for share in shares]


def test_steps_that_do_not_wait_are_passed_over() -> None:
    assert watch(0.0, 0.01, TOLERATED) == [None] * 3


def test_the_warm_up_does_not_count() -> None:
    seen = InputStalls(ClipWorkers(2, 16))
    assert [seen.add(5, 1.0, 1.0) for _ in range(WARM_UP_STEPS // 5)] == [None] * (WARM_UP_STEPS // 5)
    assert seen.wait_percent is None
    assert seen.add(20, 10.0, 1.0) is not None
    assert seen.wait_percent == pytest.approx(10.0)


def test_a_wait_is_said_once_and_again_when_it_changes_much() -> None:
    said = watch(0.2, 0.25, 0.15, 0.5, 0.45, 0.1, 0.0, 0.0, 0.2)
    assert [line is not None for line in said] == [True, False, False, True, False, True, True, False, True]
    assert (
        said[0] is not None
        and "20% of the time is input stall, 0.100 s of 0.500 s per step over the last 20 steps" in said[0]
    )
    assert said[6] is not None and "no longer" in said[6]


def test_a_share_about_the_limit_is_said_once() -> None:
    assert [line is not None for line in watch(0.021, 0.019, 0.022, 0.015, 0.021, 0.009)] == [True, *[False] * 4, True]


def test_short_stretches_are_judged_together() -> None:
    assert [line is not None for line in watch(*[0.2] * 8, steps=5)] == [False] * 3 + [True] + [False] * 4


@given(
    workers=st.integers(1, 64),
    clips_s=st.floats(0.1, 100.0),
    compute_s=st.floats(0.05, 10.0),
)
def test_as_many_workers_as_are_advised_are_enough_and_one_less_is_not(
    workers: int, clips_s: float, compute_s: float
) -> None:
    """Steps whose clips take `clips_s` of worker time, and which compute for `compute_s`."""
    step_s = max(compute_s, clips_s / workers)
    needed = ClipWorkers(workers, 99).workers_needed(step_s, step_s - compute_s)
    if step_s > compute_s * (1 + 1e-9):
        assert clips_s / needed <= compute_s * (1 + 1e-9)
        assert clips_s / (needed - 1) > compute_s * (1 - 1e-9) or needed == workers + 1


def test_decoding_in_the_rank_itself_advises_what_runs_beside_it() -> None:
    assert ClipWorkers(0, 8).workers_needed(step_s=1.0, wait_s=0.75) == 3


@pytest.mark.parametrize(("cores", "words"), [(8, "Fix: pipeline.workers=4"), (4, "prepare.py transcode")])
def test_the_advice_knows_the_nodes_cores(cores: int, words: str) -> None:
    advice = ClipWorkers(2, cores).advice(step_s=1.0, wait_s=0.5)
    assert words in advice and f"{cores} cores available per rank" in advice
    assert ("transcode" in advice) == (cores == 4)


def test_under_dali_its_threads_are_advised_and_on_a_gpu_other_clips() -> None:
    assert "Fix: pipeline.dali_threads=4" in ClipWorkers(2, 8, "pipeline.dali_threads").advice(step_s=1.0, wait_s=0.5)
    advice = ClipWorkers(2, 8, None).advice(step_s=1.0, wait_s=0.5)
    assert "prepare.py transcode" in advice and "dali_threads" not in advice


def test_a_step_that_does_nothing_but_wait_has_an_advice() -> None:
    assert math.isfinite(ClipWorkers(1, 1).workers_needed(1.0, 1.0))


CORES = """
from distributed.topology import Topology
from training.build.data import cores_of_rank
print(cores_of_rank(Topology("none", 0, 4, 0, 4, 0, "here")))
"""


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a bound rank needs a core that it has not")
def test_a_ranks_cores_are_those_it_is_bound_to_or_its_part_of_the_nodes() -> None:
    everywhere, one = f"0-{os.cpu_count() - 1}", "0"  # type: ignore[operator]
    cores = [
        float(subprocess.check_output(["taskset", "--cpu-list", bound, sys.executable, "-c", CORES], cwd=CHECKOUT))
        for bound in (everywhere, one)
    ]
    assert cores == [os.cpu_count() / 4, 1.0]  # type: ignore[operator]

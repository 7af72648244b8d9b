"""Who holds the others up: named when it stands out for a while, and nobody in a healthy job."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import make_clips, start_training, wait_for_record
from worlds import World

from training.records import read_metrics
from training.stragglers import EXCESS, WINDOW_STEPS, WINDOWS, Stragglers


def named_after(busy: list[list[float]], steps: int = WINDOW_STEPS) -> list[tuple[int, int]]:
    """(window, rank) of each naming, when each of these windows holds seconds by rank."""
    stragglers = Stragglers(len(busy[0]))
    return [
        (window, rank)
        for window, seconds in enumerate(busy)
        for rank, _, _ in stragglers.add(torch.tensor(seconds, dtype=torch.float64) * steps, steps)
    ]


def test_a_rank_is_named_once_behind_the_last_window_in_a_row() -> None:
    slow = [1.0, 1.0, 1.0 + EXCESS + 0.01, 1.0]
    assert named_after([slow] * 5) == [(WINDOWS - 1, 2)]


def test_a_rank_that_recovers_can_be_named_again() -> None:
    slow, healthy = [1.0, 2.0, 1.0], [1.0, 1.0, 1.0]
    assert named_after([slow, slow, healthy, slow, slow]) == [(1, 1), (4, 1)]


def test_a_single_slow_window_names_nobody() -> None:
    slow, healthy = [1.0, 1.0, 9.0, 1.0], [1.0] * 4
    assert named_after([healthy, slow, healthy, slow, healthy]) == []


def test_two_of_four_can_be_named_together() -> None:
    assert named_after([[1.0, 2.0, 1.0, 2.0]] * 2) == [(1, 1), (1, 3)]


def test_of_two_ranks_the_slower_is_named() -> None:
    assert named_after([[1.0, 1.5]] * 2) == [(1, 1)]


def test_one_rank_has_nobody_to_hold_up() -> None:
    assert named_after([[5.0]] * 4) == []


def test_records_of_few_steps_add_up_to_a_window() -> None:
    slow = [[1.0, 2.0]] * (2 * WINDOW_STEPS)
    assert named_after(slow, steps=1) == [(2 * WINDOW_STEPS - 1, 1)]


def test_a_rank_is_named_within_50_steps_wherever_in_a_window_it_begins() -> None:
    for healthy in range(8):
        seconds = [[1.0] * 4] * healthy + [[1.0, 1.0, 1.0, 1.43]] * 5
        ((record, rank),) = named_after(seconds, steps=10)
        assert rank == 3 and (record + 1 - healthy) * 10 <= 50


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.5, 0.59), min_size=2, max_size=64), st.integers(1, 6))
def test_ranks_within_the_noise_are_never_named(seconds: list[float], windows: int) -> None:
    assert named_after([seconds] * windows) == []


# --- A real job -------------------------------------------------------------------------------------------------------

SMALL = (
    "experiment=smoke logger=disabled logger.every_steps=5 pipeline.size=32 model.num_frames=4 pipeline.decoder=pyav "
    "pipeline.workers=0 batch.global_batch=8 batch.bn_group=2 schedule.warmup_epochs=0 schedule.epochs=4000 "
    "evaluation.every_epochs=10000 checkpoint.every_epochs=10000"
).split()
PERIOD_S, STOPPED_PART = 1.0, 0.3


@pytest.mark.slow
def test_a_rank_that_is_stopped_for_three_tenths_of_the_time_is_named_within_50_steps(tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "clips")
    arguments = [*SMALL, f"data.root={clips}", f"outputs={tmp_path}", "run_id=straggler"]
    job = start_training(World("torchrun", 4), tmp_path / "console.txt", *arguments)
    metrics = tmp_path / "straggler" / "metrics.jsonl"
    wait_for_record(metrics, "train", 180)
    victim, over = job.ranks()[2], threading.Event()

    def hold_up() -> None:
        while not over.wait(PERIOD_S * (1 - STOPPED_PART)):
            os.kill(victim, signal.SIGSTOP)  # the job ends behind this thread
            time.sleep(PERIOD_S * STOPPED_PART)
            os.kill(victim, signal.SIGCONT)

    began = read_metrics(metrics)[-1]["step"]
    thread = threading.Thread(target=hold_up)
    thread.start()
    try:
        wait_for_record(metrics, "straggler", 180)
    finally:
        over.set()
        thread.join()
        job.kill()
        job.process.wait(30)
    (record,) = [record for record in read_metrics(metrics) if record["kind"] == "straggler"]
    assert record["rank"] == 2
    assert record["step"] - began <= 50, record

"""Stragglers: a rank is named if it is slow for a while, and none is named in a healthy job."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed.backends.single import SingleBackend
from distributed.topology import find_topology
from tests.helpers.jobs import make_clips, start_training, wait_for_record
from tests.helpers.worlds import CHECKOUT, World
from training.telemetry.records import read_metrics
from training.telemetry.step_clock import StepClock
from training.telemetry.stragglers import EXCESS, WINDOW_STEPS, WINDOWS, Straggler, Stragglers


def stragglers_after(own: list[list[float]], steps: int = WINDOW_STEPS) -> list[tuple[int, Straggler]]:
    """Return (window, straggler) of each report, given each window's own seconds per step by rank."""
    stragglers = Stragglers(len(own[0]))
    found = []
    for window, own_s in enumerate(own):
        own_R = torch.tensor(own_s, dtype=torch.float64) * steps
        found += [(window, straggler) for straggler in stragglers.add(own_R, steps)]
    return found


def named_after(own: list[list[float]], steps: int = WINDOW_STEPS) -> list[tuple[int, int]]:
    """Return (window, rank) of each report."""
    return [(window, straggler.rank) for window, straggler in stragglers_after(own, steps)]


def test_a_rank_is_named_once_after_the_last_window_in_a_row() -> None:
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


def test_a_rank_is_not_named_for_windows_that_are_slow_in_the_mean_only() -> None:
    """Other programs on a node cause short bursts, so every window must be slow."""
    slow, healthy = [1.0, 1.0, 1.9], [1.0, 1.0, 1.05]
    assert named_after([slow, healthy] * 5) == []


def test_a_straggler_has_its_own_time_and_the_median_ranks() -> None:
    ((window, straggler),) = stragglers_after([[1.1, 1.9, 1.0, 1.3]] * 9)
    assert (window, straggler.rank) == (WINDOWS - 1, 1)
    assert straggler.busy_s == pytest.approx(1.9) and straggler.median_busy_s == pytest.approx(1.1)


COMPUTE = """
import sys, time
import torch
from torch import nn
from distributed.backends.single import SingleBackend
from distributed.topology import find_topology
from training.telemetry.step_clock import StepClock
network = nn.Linear(4, 1)
clock = StepClock(network, SingleBackend(find_topology({}), torch.device("cpu")))
clock.begin_input()
clock.begin_step()
print("began", flush=True)
began_s = time.perf_counter()
until_s = time.thread_time() + 0.5
while time.thread_time() < until_s:
    pass
network(torch.ones(1, 4)).sum().backward()
clock.end_step()
print(clock.read().own_s, time.perf_counter() - began_s)
"""


@pytest.mark.parametrize("fault", ["none", "other program", "stopped"])
def test_a_stop_counts_and_other_programs_do_not(fault: str) -> None:
    """Half a second of work on one core: undisturbed, sharing the core with two programs, and stopped for a second."""
    core = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))]
    with ExitStack() as stack:

        def start(program: str) -> subprocess.Popen[str]:
            command = [*core, sys.executable, "-c", program]
            process = stack.enter_context(subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            return process

        rank = start(COMPUTE)
        assert rank.stdout is not None and rank.stdout.readline() == "began\n"
        if fault == "other program":
            start("while True: pass")
            start("while True: pass")
        elif fault == "stopped":
            rank.send_signal(signal.SIGSTOP)
            time.sleep(1)
            rank.send_signal(signal.SIGCONT)
        own_s, took_s = map(float, rank.stdout.readline().split())
    assert own_s == pytest.approx(1.5 if fault == "stopped" else 0.5, abs=0.2)
    if fault == "other program":
        assert took_s - own_s > 0.3


def test_beside_messages_the_wait_for_a_core_is_not_taken_off_twice() -> None:
    backend = SingleBackend(find_topology({}), torch.device("cpu"))
    network = torch.nn.Linear(4, 1)
    clock = StepClock(network, backend)
    began_s = time.perf_counter()
    clock.begin_input()
    clock.begin_step()
    backend.waited_s += 0.001
    time.sleep(0.01)
    loss = network(torch.ones(1, 4)).sum()
    clock.mark("backward")
    loss.backward()
    clock.end_step()
    times, took_s = clock.read(), time.perf_counter() - began_s
    assert times.messages_s == pytest.approx(0.001)
    assert 0.009 <= times.own_s <= took_s - 0.001


@settings(max_examples=50)
@given(st.lists(st.floats(0.5, 0.64), min_size=2, max_size=64), st.integers(1, 6))
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
def test_a_rank_that_is_stopped_for_three_tenths_of_the_time_is_named(tmp_path: Path) -> None:
    """How many steps it takes depends on the machine's load too; in windows that are all slow it takes at most 50."""
    clips = make_clips(tmp_path / "clips")
    arguments = [*SMALL, f"data.root={clips}", f"outputs={tmp_path}", "run_id=straggler"]
    job = start_training(World("torchrun", 4), tmp_path / "console.txt", *arguments)
    metrics = tmp_path / "straggler" / "metrics.jsonl"
    wait_for_record(metrics, "train", 180)
    victim, over = job.ranks()[2], threading.Event()

    def hold_up() -> None:
        while not over.wait(PERIOD_S * (1 - STOPPED_PART)):
            # The victim is alive: the job is killed after this thread has ended.
            os.kill(victim, signal.SIGSTOP)
            time.sleep(PERIOD_S * STOPPED_PART)
            os.kill(victim, signal.SIGCONT)

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

"""Phases of a step: on a clock that the test moves, and summed over ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from distributed.backends.single import SingleBackend
from distributed.topology import find_topology
from tests.helpers.trainers import batches_of, trainer_of
from training.telemetry import step_clock
from training.telemetry.device import peak_flops
from training.telemetry.eta import Eta, duration_text
from training.telemetry.rank_times import RankTimes, rank_values
from training.telemetry.step_clock import PHASES, StepClock, StepTimes


class Clock:
    """A clock for StepClock that moves only when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(step_clock, "time", SimpleNamespace(perf_counter=lambda: self.now_s))

    def takes(self, seconds: float) -> Any:
        """Return a hook that takes so long."""

        def hook(*_: object) -> None:
            self.now_s += seconds

        return hook


def test_each_phase_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of two micro-steps whose parts take times that no two sums share."""
    clock = Clock(monkeypatch)
    trainer = trainer_of(micro_batch=2)
    measured = StepClock(trainer.network, SingleBackend(find_topology({}), torch.device("cpu")))
    measured._reads_run_queue = False
    trainer.network.register_forward_hook(clock.takes(1))
    # The classifier's gradient comes early, and the first layer's last.
    *_, bias = trainer.network.parameters()
    bias.register_post_accumulate_grad_hook(clock.takes(16))
    finish, update = trainer.reducer.finish, trainer.optimizer.step

    def finish_late() -> None:
        clock.now_s += 256
        finish()

    def update_slowly(*arguments: Any) -> None:
        clock.now_s += 4096
        update(*arguments)

    monkeypatch.setattr(trainer.reducer, "finish", finish_late)
    monkeypatch.setattr(trainer.optimizer, "step", update_slowly)
    for step in range(2):
        measured.begin_input()
        clock.now_s += 0.125
        measured.begin_step()
        trainer.step(step, batches_of(trainer, step), mark=measured.mark)
        measured.end_step()
        clock.now_s += 0.5
    measured.restart()
    times = measured.read()
    # 0.5 s after the first step; those after the last belong to no phase.
    between_s = 2 * 0.125 + 0.5
    expected = {"between_steps": between_s, "forward": 4, "backward": 64, "reduction_wait": 512, "optimizer": 8192}
    assert times.phases_s == expected
    assert tuple(times.phases_s) == PHASES
    assert (times.steps, times.own_s) == (2, 2 * 0.125 + 4 + 64)
    assert measured.read().phases_s == dict.fromkeys(PHASES, 0)


def test_an_evaluation_between_two_steps_belongs_to_no_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    measured = StepClock(nn.Linear(1, 1), SingleBackend(find_topology({}), torch.device("cpu")))
    measured._reads_run_queue = False
    for seconds in (1, 2):
        measured.begin_input()
        measured.begin_step()
        clock.now_s += seconds
        measured.end_step()
        clock.now_s += 1000
        measured.restart()
        clock.now_s += 0.25
    times = measured.read()
    assert times.phases_s["forward"] == 3 and times.phases_s["between_steps"] == 2 * 0.25


def rank_times(*own_s: float, input_s: float = 0, messages_s: float = 0, reduction_s: float = 0) -> RankTimes:
    """Return the times of ranks that each took 10 steps; memory grows with the rank."""
    values = []
    for rank, seconds in enumerate(own_s):
        phases_s = dict.fromkeys(PHASES, 0.0) | {"reduction_wait": 10 * (reduction_s + max(own_s) - seconds)}
        times = StepTimes(10, 10 * seconds, 10 * messages_s, phases_s)
        values.append(rank_values(times, input_s if rank == 1 else 0.0, 1000 + rank))
    return RankTimes(torch.tensor(values, dtype=torch.float64).T)


def test_a_record_names_the_worst_rank_and_the_spread_over_ranks() -> None:
    fields = rank_times(*(1 + rank / 100 for rank in range(100)), 5.0).fields(step_s=6.0)
    assert (fields["busy_p50_s"], fields["busy_p90_s"]) == (pytest.approx(1.5), pytest.approx(1.9))
    assert (fields["busy_max_s"], fields["worst_rank"], fields["peak_memory_bytes"]) == (5.0, 100, 1100)


@pytest.mark.parametrize(
    ("ranks", "cause"),
    [
        (rank_times(1.0, 1.05, 1.0), "compute"),
        (rank_times(1.0), "compute"),
        (rank_times(1.0, 1.5, 1.0), "rank 1"),
        (rank_times(1.0, 1.5), "rank 1"),
        (rank_times(1.0, 1.5, 1.0, input_s=0.4), "input"),
        (rank_times(1.0, 1.0, reduction_s=0.3), "all-reduce"),
        (rank_times(1.0, 1.2, reduction_s=0.3), "all-reduce"),
        (rank_times(1.0, 1.0, messages_s=0.4, reduction_s=0.3), "batch norm messages"),
    ],
)
def test_the_limiting_cause_is_the_largest_loss(ranks: RankTimes, cause: str) -> None:
    assert ranks.fields(step_s=1.5)["limited_by"] == cause


def test_an_eta_counts_recent_steps_and_evaluations_to_come() -> None:
    eta = Eta(last_step=1000, evaluation_steps={100, 500, 1000})
    eta.add(10, 20.0)
    assert eta.seconds(10) == 990 * 2.0
    eta.evaluated(60.0)
    assert eta.seconds(10) == 990 * 2.0 + 3 * 60.0
    # Its own evaluation comes after the record.
    assert eta.seconds(500) == 500 * 2.0 + 2 * 60.0
    for _ in range(20):
        eta.add(10, 5.0)
    assert eta.seconds(900) == 100 * 0.5 + 60.0
    assert [duration_text(seconds) for seconds in (0, 59.6, 3661, 90061)] == [
        "0:00:00",
        "0:01:00",
        "1:01:01",
        "1 d 01:01:01",
    ]


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-SXM2-16GB", "tf32", 15.7),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "float16", 756),
        ("NVIDIA RTX A1000", "float16", None),
        ("NVIDIA T400", "float16", None),
        ("Fake GPU", "float32", None),
    ],
)
def test_the_peak_of_a_known_gpu_is_that_of_its_data_sheet(name: str, precision: str, tflops: float | None) -> None:
    assert peak_flops(name, precision) == (None if tflops is None else pytest.approx(tflops * 1e12))

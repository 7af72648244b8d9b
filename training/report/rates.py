"""Throughput of a run in three rates, and where its time went."""

from collections.abc import Sequence
from dataclasses import dataclass

from .history import History, Record


@dataclass(frozen=True)
class Spent:
    """Clips and time of all steps that a run kept."""

    clips: float
    steps: int
    steps_s: float
    """Wall time of the steps, without evaluations and blocking parts of checkpoints."""
    input_s: float
    """The part of it in which rank 0 waited for clips."""

    @classmethod
    def of(cls, train: Sequence[Record]) -> "Spent":
        clips, steps, steps_s, input_s = 0.0, 0, 0.0, 0.0
        for record in train:
            step_s, clips_per_s = _number(record, "step_s"), _number(record, "clips_per_s")
            if step_s is None or clips_per_s is None:
                continue
            taken_s = step_s * record["steps"]
            clips += clips_per_s * taken_s
            steps += record["steps"]
            steps_s += taken_s
            input_s += taken_s * (_number(record, "input_wait_percent") or 0.0) / 100
        return cls(clips, steps, steps_s, input_s)


@dataclass(frozen=True)
class Rates:
    """Clips per second over three times, as FlagPerf defines them. A step that was repeated after a kill counts once."""

    whole_job: float
    """Over the job's time: start-up, evaluations, checkpoints and repeated steps included."""
    training: float
    """Over the steps alone."""
    compute: float
    """Over the steps without rank 0's wait for clips."""


def rates_of(history: History) -> Rates | None:
    """Return the three rates; None without a training record."""
    spent = Spent.of(history.train)
    computing_s = spent.steps_s - spent.input_s
    if min(history.duration_s, spent.steps_s, computing_s) <= 0:
        return None
    # Records of versions without job_start begin with the first start, so a short run's time may lack its first steps.
    job_s = max(history.duration_s, spent.steps_s)
    return Rates(spent.clips / job_s, spent.clips / spent.steps_s, spent.clips / computing_s)


def mean_per_step(train: Sequence[Record], key: str) -> float | None:
    """Return the mean of a per-step value over all steps; None if no record has it."""
    having = [(record["steps"], value) for record in train if (value := _number(record, key)) is not None]
    steps = sum(count for count, _ in having)
    return sum(count * value for count, value in having) / steps if steps else None


def _number(record: Record, key: str) -> float | None:
    value = record.get(key)
    # A NaN is unlike itself.
    return float(value) if isinstance(value, int | float) and value == value else None

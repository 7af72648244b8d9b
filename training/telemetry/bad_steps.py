"""What becomes known of steps that were rolled back: counted, their clips written down, and an end when they do not cease."""

import math
from dataclasses import dataclass

from training.errors import DivergedError
from training.job import Job

from .metrics_log import MetricsLog


@dataclass(frozen=True)
class BadStep:
    """A step whose reduced gradient was not finite, as one rank saw it: its clips' rows, and the sum of their losses."""

    step: int
    rows: list[int]
    loss: float


class BadSteps:
    """The bad steps of a run; every rank keeps the same count, because all decide by the same gradient."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._in_a_row = 0
        self._seen = 0

    def report(self, steps: list[tuple[BadStep, bool]], records: MetricsLog) -> None:
        """Take in the steps since the last report, in order, each with whether it was bad; collective where any was.

        Raises DivergedError when too many of them came in a row.
        """
        bad = [step for step, was_bad in steps if was_bad]
        if not bad:
            self._in_a_row = 0 if steps else self._in_a_row
            return
        suspects = self._write_down(bad, records)
        limit = self._job.config.numerics.max_bad_steps_in_a_row
        for step, was_bad in steps:
            self._in_a_row = self._in_a_row + 1 if was_bad else 0
            if self._in_a_row >= limit:
                raise DivergedError(
                    f"the gradient was not finite in {self._in_a_row} steps in a row, the last of them step {step.step} "
                    f"(numerics.max_bad_steps_in_a_row={limit}); {suspects}. Weights are as before these steps, and "
                    f"{self._job.folder.bad_steps} names the clips. Fix: lower optimizer.lr, or lengthen "
                    "schedule.warmup_epochs, or set optimizer.clip_norm, or numerics.amp=bfloat16 in place of float16"
                )

    def _write_down(self, bad: list[BadStep], records: MetricsLog) -> str:
        """A line for each in the run folder; in words, where the losses were not finite."""
        by_rank = self._job.backend.all_gather_objects([(step.rows, step.loss) for step in bad])
        ranks = set()
        for number, step in enumerate(bad):
            here = [rank for rank, seen in enumerate(by_rank) if not math.isfinite(seen[number][1])]
            ranks.update(here)
            rows = [seen[number][0] for seen in by_rank]
            records.bad_step(self._job.folder, step=step.step, ranks_not_finite=here, rows_by_rank=rows)
        self._seen += len(bad)
        records.write("bad_steps", bad[-1].step + 1, steps=[step.step for step in bad], since_start=self._seen)
        where = f"losses were not finite on ranks {sorted(ranks)}" if ranks else "losses were finite on all ranks"
        records.info(
            f"{len(bad)} steps were rolled back, the last of them step {bad[-1].step}: their gradient was not finite; {where}. "
            f"Clips: {self._job.folder.bad_steps.name}"
        )
        return where

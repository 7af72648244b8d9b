"""Log steps skipped for non-finite gradients, with their clips, and abort after too many in a row.

Files and records call them bad steps: bad_steps.jsonl in the run folder, kind `bad_steps` in metrics.jsonl.
"""

import math
from dataclasses import dataclass

from training.errors import DivergedError
from training.job import Job

from .metrics_log import MetricsLog


@dataclass(frozen=True)
class TakenStep:
    """A step as one rank saw it."""

    step: int
    rows: list[int]
    """Manifest rows of this rank's clips."""
    loss: float
    """Sum over this rank's clips."""
    skipped: bool
    """The reduced gradient was not finite, so the step changed nothing. The same on all ranks."""


class SkippedSteps:
    """The skipped steps of a run. All ranks count the same, because they judge the same reduced gradient."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._in_a_row = 0
        self._total = 0

    def report(self, steps: list[TakenStep], log: MetricsLog) -> None:
        """Count and log the skipped ones of the steps since the last report; collective if there are any.

        Raises DivergedError if there are too many in a row.
        """
        skipped = [step for step in steps if step.skipped]
        if not skipped:
            self._in_a_row = 0 if steps else self._in_a_row
            return
        losses = self._log(skipped, log)
        limit = self._job.config.numerics.max_bad_steps_in_a_row
        for step in steps:
            self._in_a_row = self._in_a_row + 1 if step.skipped else 0
            if self._in_a_row >= limit:
                raise DivergedError(
                    f"non-finite gradients in {self._in_a_row} steps in a row, the last at step {step.step} "
                    f"(numerics.max_bad_steps_in_a_row={limit}); {losses}. The weights are as before these steps. "
                    f"{self._job.folder.bad_steps} lists the clips. Fix: lower optimizer.lr, or lengthen "
                    "schedule.warmup_epochs, or set optimizer.clip_norm, or numerics.amp=bfloat16 instead of float16"
                )

    def _log(self, skipped: list[TakenStep], log: MetricsLog) -> str:
        """Write a line for each step to the run folder. Returns, in words, on which ranks losses were not finite."""
        by_rank = self._job.backend.all_gather_objects([[step.rows, step.loss] for step in skipped])
        all_ranks = set()
        for number, step in enumerate(skipped):
            ranks = [rank for rank, parts in enumerate(by_rank) if not math.isfinite(parts[number][1])]
            all_ranks.update(ranks)
            rows = [parts[number][0] for parts in by_rank]
            log.bad_step(self._job.folder, step=step.step, ranks_not_finite=ranks, rows_by_rank=rows)
        self._total += len(skipped)
        log.write("bad_steps", skipped[-1].step + 1, steps=[step.step for step in skipped], since_start=self._total)
        losses = f"losses not finite on ranks {sorted(all_ranks)}" if all_ranks else "losses finite on all ranks"
        log.info(
            f"skipped steps: {len(skipped)} for non-finite gradients, the last at step {skipped[-1].step}; {losses}. "
            f"Clips: {self._job.folder.bad_steps.name}"
        )
        return losses

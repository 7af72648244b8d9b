"""Detect input stalls: log when steps start to wait for clips, when the wait changes much, and its share of the whole run."""

import math
from dataclasses import dataclass

from distributed.backends.base import Backend
from training.build.data import cores_of_rank, dali_threads
from training.config.schema import PipelineConfig

# Workers start, caches fill, and the first batches always take long.
WARM_UP_STEPS = 20
# Share of the time that may be input stall.
TOLERATED = 0.02
# Number of steps to judge together, at least.
_JUDGED_STEPS = 20
# Log again when the share has grown or fallen by this factor.
_LOG_AGAIN_FACTOR = 2.0


@dataclass(frozen=True)
class ClipWorkers:
    """The decoding workers of a rank."""

    workers: int
    """Number of worker processes, or of DALI's threads; 0: the rank itself decodes."""
    cores: float
    """Cores of the node for each of its ranks."""
    key: str | None = "pipeline.workers"
    """Key that sets their number; None: a GPU decodes."""

    @classmethod
    def of(cls, pipeline: PipelineConfig, backend: Backend) -> "ClipWorkers":
        cores = cores_of_rank(backend.topology)
        if pipeline.loader == "torch":
            return cls(pipeline.workers, cores)
        threads = dali_threads(pipeline, backend.topology)
        return cls(threads, cores, "pipeline.dali_threads" if backend.device.type == "cpu" else None)

    def workers_needed(self, step_s: float, wait_s: float) -> int:
        """Return the number of workers that ends the stall of steps that wait `wait_s` of their `step_s`.

        During a stall all workers are busy, so the clips of a step take `workers * step_s` of work. That has to fit into the
        rest of the step.
        """
        busy_s = self.workers * step_s if self.workers else wait_s
        return max(self.workers + 1, math.ceil(busy_s / max(step_s - wait_s, 1e-3)))

    def advice(self, step_s: float, wait_s: float) -> str:
        """Return how to end the stall."""
        if self.key is None:
            return (
                "Fix: `prepare.py transcode`, for clips that a GPU decodes faster; or pipeline=torch, if cores are idle"
            )
        needed = self.workers_needed(step_s, wait_s)
        count = f"about {needed} workers per rank needed, {self.workers} configured, {self.cores:g} cores available per rank"
        if needed + 1 <= self.cores:
            return f"{count}. Fix: {self.key}={needed}"
        return (
            f"{count}. Fix: `prepare.py transcode`, for clips that decode many times as fast; "
            f"or {self.key}={needed} all the same, if the file system is slow"
        )


class InputStalls:
    """Judges the input stalls of a run, by the rank that waits longest for its clips."""

    def __init__(self, workers: ClipWorkers) -> None:
        self._workers = workers
        self._seen_steps = 0
        # Since the last judgement.
        self._steps, self._duration_s, self._wait_s = 0, 0.0, 0.0
        # Since the warm-up.
        self._total_s, self._total_wait_s = 0.0, 0.0
        # 0: no stall is logged, or its end is.
        self._logged_share = 0.0

    def add(self, steps: int, duration_s: float, wait_s: float) -> str | None:
        """Take the next `steps` steps; `wait_s`: the longest wait of any rank. Returns a line to log when there is news.

        Steps that begin within the warm-up do not count.
        """
        warm = self._seen_steps >= WARM_UP_STEPS
        self._seen_steps += steps
        if not warm:
            return None
        self._steps += steps
        self._duration_s += duration_s
        self._wait_s += wait_s
        self._total_s += duration_s
        self._total_wait_s += wait_s
        return self._judge() if self._steps >= _JUDGED_STEPS else None

    def _judge(self) -> str | None:
        share, step_s = self._wait_s / self._duration_s, self._duration_s / self._steps
        wait_s, steps = self._wait_s / self._steps, self._steps
        self._steps, self._duration_s, self._wait_s = 0, 0.0, 0.0
        logged = self._logged_share
        if share <= TOLERATED:
            if not logged or share > TOLERATED / _LOG_AGAIN_FACTOR:
                return None
            self._logged_share = 0.0
            return f"no longer input-bound: {share:.1%} of the time is input stall, over the last {steps} steps"
        if logged and logged / _LOG_AGAIN_FACTOR < share < logged * _LOG_AGAIN_FACTOR:
            return None
        self._logged_share = share
        return (
            f"input-bound: {share:.0%} of the time is input stall, {wait_s:.3f} s of {step_s:.3f} s per step over the last "
            f"{steps} steps; {self._workers.advice(step_s, wait_s)}"
        )

    @property
    def wait_percent(self) -> float | None:
        """Share of the time since the warm-up; None if the run was shorter."""
        return 100 * self._total_wait_s / self._total_s if self._total_s else None

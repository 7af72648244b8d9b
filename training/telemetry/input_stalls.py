"""Whether the steps wait for clips: said in the log when it begins, when it changes much, and at the end of the run."""

import math
from dataclasses import dataclass

from distributed.backends.base import Backend
from training.build.data import cores_of_rank, dali_threads
from training.config.schema import Config

WARM_UP_STEPS = 20  # workers start, caches fill and the first batches are waited for
TOLERATED = 0.02  # of the time
_WINDOW_STEPS = 20  # a judgement is of so many steps or more
_MUCH = 2.0  # a share so many times the one that was said, or so many times less, is said again


@dataclass(frozen=True)
class ClipWorkers:
    """What decodes for a rank."""

    workers: int
    """Processes, or threads of DALI; 0: the rank itself."""
    cores: float
    """Of the node, for each of its ranks."""
    key: str | None = "pipeline.workers"
    """What sets their number; None: a GPU decodes."""

    @classmethod
    def of(cls, config: Config, backend: Backend) -> "ClipWorkers":
        """As this process finds it."""
        cores = cores_of_rank(backend.topology)
        if config.pipeline.loader == "torch":
            return cls(config.pipeline.workers, cores)
        threads = dali_threads(config, backend.topology)
        return cls(threads, cores, "pipeline.dali_threads" if backend.device.type == "cpu" else None)

    def workers_needed(self, step_s: float, wait_s: float) -> int:
        """For steps that wait `wait_s` of their `step_s`: workers that are waited for are always busy, so the clips of a step take
        them `workers * step_s` together, and have to be there within the rest of it."""
        busy_s = self.workers * step_s if self.workers else wait_s
        return max(self.workers + 1, math.ceil(busy_s / max(step_s - wait_s, 1e-3)))

    def advice(self, step_s: float, wait_s: float) -> str:
        """What to do about it."""
        if self.key is None:
            return "Fix: `prepare.py transcode`, whose clips a GPU decodes faster, too; or pipeline=torch, if cores are idle"
        needed = self.workers_needed(step_s, wait_s)
        told = f"{self.key}={needed} would do, where {self.workers} are, and each rank has {self.cores:g} cores of its node"
        if needed + 1 <= self.cores:
            return f"Fix: {told}"
        return (
            f"{told}: too few, if it is decoding that takes the time. Fix: `prepare.py transcode`, whose clips decode many "
            "times as fast; or more workers all the same, if it is the file system"
        )


class InputWatch:
    """Hears of every stretch of steps what it took, and how long the rank that waited most for its clips did so."""

    def __init__(self, workers: ClipWorkers) -> None:
        self._workers = workers
        self._seen_steps = 0
        self._steps, self._duration_s, self._wait_s = 0, 0.0, 0.0  # not yet judged
        self._total_s, self._total_wait_s = 0.0, 0.0
        self._said = 0.0

    def add(self, steps: int, duration_s: float, wait_s: float) -> str | None:
        """A line for the log when there is something new to say. Stretches that begin within the warm-up do not count."""
        warm = self._seen_steps >= WARM_UP_STEPS
        self._seen_steps += steps
        if not warm:
            return None
        self._steps += steps
        self._duration_s += duration_s
        self._wait_s += wait_s
        self._total_s += duration_s
        self._total_wait_s += wait_s
        return self._judge() if self._steps >= _WINDOW_STEPS else None

    def _judge(self) -> str | None:
        share, step_s = self._wait_s / self._duration_s, self._duration_s / self._steps
        wait_s, steps = self._wait_s / self._steps, self._steps
        self._steps, self._duration_s, self._wait_s = 0, 0.0, 0.0
        if share <= TOLERATED:
            if not self._said or share > TOLERATED / _MUCH:
                return None
            self._said = 0.0
            return f"the steps wait for clips no longer: {share:.1%} of the time of the last {steps}"
        if self._said and self._said / _MUCH < share < self._said * _MUCH:
            return None
        self._said = share
        return (
            f"the steps wait for clips {share:.0%} of the time: {wait_s:.3f} s of {step_s:.3f} s in each of the last {steps}. "
            f"{self._workers.advice(step_s, wait_s)}"
        )

    @property
    def wait_percent(self) -> float | None:
        """Of the time since the warm-up; None where the run was no longer than that."""
        return 100 * self._total_wait_s / self._total_s if self._total_s else None

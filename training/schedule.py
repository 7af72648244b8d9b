"""Learning-rate schedules as pure functions of the step.

Momentum correction (Goyal et al., arXiv:1706.02677, section 3) is due where a velocity that contains the rate meets a rate that
rises in leaps: the old part of the velocity is then of another scale than the new one. torch's SGD keeps the rate outside of
its velocity. LARS of ours has it inside and corrects nothing, as in MLPerf's reference, whose settings are tuned to that: no
rate here ever leaps up (a warm-up adds the same amount at every step, a run without one starts at rest), and where a milestone
lowers it, each gradient still counts with the rate of its own step, only spread over the 1 / (1 - momentum) steps that follow.
"""

import math
from dataclasses import dataclass
from typing import Literal

Scaling = Literal["none", "linear", "sqrt"]
Decay = Literal["constant", "step", "cosine", "poly2"]


@dataclass(frozen=True)
class Schedule:
    """A warm-up from `warmup_start` to `peak` over `warmup_steps`, then a decay to `end` at `total_steps`.

    `milestone_steps` are for `step` decay: the rate is multiplied by `factor` at each of them. `poly2` is the polynomial of
    degree 2 of MLPerf's LARS reference, whose own steps of warm-up and decay are counted by one step differently.
    """

    decay: Decay
    peak: float
    total_steps: int
    warmup_steps: int = 0
    warmup_start: float = 0.0
    milestone_steps: tuple[int, ...] = ()
    factor: float = 0.1
    end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(f"a warm-up of {self.warmup_steps} steps does not fit into {self.total_steps}")
        if self.decay not in ("constant", "step", "cosine", "poly2"):
            raise ValueError(f"decay must be one of constant, step, cosine, poly2, got {self.decay!r}")

    def learning_rate(self, step: int) -> float:
        """The rate that step `step` (from 0) is taken with.

        Gradual warm-up is linear in the step and reaches the peak with the first step behind it (Goyal et al.,
        arXiv:1706.02677, section 2.2).
        """
        if step < self.warmup_steps:
            return self.warmup_start + (self.peak - self.warmup_start) * (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant":
            return self.peak
        if self.decay == "step":
            return self.peak * self.factor ** sum(step >= milestone for milestone in self.milestone_steps)
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        left = 0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else (1 - progress) ** 2
        return self.end + (self.peak - self.end) * left


def scaled_rate(rate: float, base_batch: int, batch: int, scaling: Scaling) -> float:
    """The peak rate for a global batch, from the one that suits `base_batch`.

    linear: Goyal et al., arXiv:1706.02677, section 2.1; sqrt: Krizhevsky, arXiv:1404.5997.
    """
    if scaling == "none":
        return rate
    ratio = batch / base_batch
    return rate * (ratio if scaling == "linear" else math.sqrt(ratio))

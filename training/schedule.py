"""Learning-rate schedules as pure functions of the step.

Momentum correction (Goyal et al., arXiv:1706.02677, section 3) matters if the velocity contains the learning rate and the rate
jumps up: the old part of the velocity then has another scale than the new one. torch's SGD keeps the rate outside its velocity.
Our LARS has it inside and does not correct, as in MLPerf's reference, whose settings are tuned to that. No schedule here jumps
up: warm-up adds the same amount at every step, and a run without warm-up starts from zero velocity. After a milestone lowers the
rate, each gradient still counts with the rate of its own step, spread over the 1 / (1 - momentum) steps that follow.
"""

import math
from dataclasses import dataclass
from typing import Literal

Scaling = Literal["none", "linear", "sqrt"]
Decay = Literal["constant", "step", "cosine", "poly2"]


@dataclass(frozen=True)
class Schedule:
    """Warm-up from `warmup_start` to `peak` over `warmup_steps`, then decay to `end` at `total_steps`.

    `step` decay multiplies the rate by `factor` at each of `milestone_steps`. `poly2` is the polynomial of degree 2 of
    MLPerf's LARS reference, which counts the steps of warm-up and decay by one step differently.
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
        """Return the learning rate of step `step` (from 0).

        Gradual warm-up is linear in the step and reaches the peak at the first step after it (Goyal et al.,
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
    """Scale the learning rate for `base_batch` to the peak rate for a global batch.

    linear: Goyal et al., arXiv:1706.02677, section 2.1; sqrt: Krizhevsky, arXiv:1404.5997.
    """
    if scaling == "none":
        return rate
    ratio = batch / base_batch
    return rate * (ratio if scaling == "linear" else math.sqrt(ratio))

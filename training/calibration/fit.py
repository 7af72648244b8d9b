"""Fit the simulator's figures to measured times. Pure functions.

Shapes: S sizes (clips of a micro-batch).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np

_LN_2, _LN_3 = log(2), log(3)


@dataclass(frozen=True)
class StepFit:
    """A step takes c0 + k x clips + an exponential delay, whose mean is the jitter."""

    c0_s: float
    k_s: float
    jitter_s: float
    worst_error: float
    """Largest relative error of the fitted line at the measured sizes."""


def fit_step(times_s: Mapping[int, Sequence[float]]) -> StepFit:
    """Fit the step times that were measured at each number of clips; at least two numbers.

    The line is fitted to the times without their delay, by least squares of the relative errors, with c0 of 0 or more.
    """
    clips_S = np.array(sorted(times_s), dtype=float)
    delays_S = [exponential_mean_s(times_s[int(clips)]) for clips in clips_S]
    # An exponential delay has its median at ln 2 of its mean.
    base_S = np.array([
        float(np.median(times_s[int(clips)])) - _LN_2 * delay_s for clips, delay_s in zip(clips_S, delays_S, strict=True)
    ])  # fmt: skip
    rows_S2 = np.stack([1 / base_S, clips_S / base_S], axis=1)
    c0_s, k_s = np.linalg.lstsq(rows_S2, np.ones(len(clips_S)), rcond=None)[0]
    if c0_s < 0:
        c0_s, share_S = 0.0, clips_S / base_S
        k_s = share_S.sum() / (share_S**2).sum()
    errors_S = abs((c0_s + k_s * clips_S) / base_S - 1)
    return StepFit(float(c0_s), float(k_s), float(np.median(delays_S)), float(errors_S.max()))


def exponential_mean_s(times_s: Sequence[float]) -> float:
    """Return the mean of the exponential delay on top of a constant time, from the quartiles, which outliers do not move."""
    low, high = np.percentile(times_s, (25, 75))
    return float(high - low) / _LN_3

"""Fit the simulator's figures to measured times. Pure functions.

Shapes: S sizes (clips of a micro-batch).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray

_LN_2, _LN_3 = log(2), log(3)


# A host limit must explain this much more: it has a number more to fit with.
_LEAST_GAIN = 2.0


@dataclass(frozen=True)
class StepFit:
    """A step takes c0 + k x clips, or what the host needs if that is longer, and an exponential delay."""

    c0_s: float
    k_s: float
    host_s: float
    """0: no size shows a limit by the host."""
    jitter_s: float
    """Mean of the delay."""
    worst_error: float
    """Largest relative error at the measured sizes."""

    def at_s(self, clips: int) -> float:
        """Return the fitted time, without the delay."""
        return max(self.host_s, self.c0_s + self.k_s * clips)


def fit_step(times_s: Mapping[int, Sequence[float]]) -> StepFit:
    """Fit the step times that were measured at each number of clips; at least two numbers.

    The times without their delay are fitted by least squares of the relative errors, with c0 of 0 or more. Small sizes that take
    the same time are the host's: a line through them would be far off for larger ones.
    """
    clips_S = np.array(sorted(times_s), dtype=float)
    delays_S = [exponential_mean_s(times_s[int(clips)]) for clips in clips_S]
    # An exponential delay has its median at ln 2 of its mean.
    base_S = np.array([
        float(np.median(times_s[int(clips)])) - _LN_2 * delay_s for clips, delay_s in zip(clips_S, delays_S, strict=True)
    ])  # fmt: skip
    jitter_s = float(np.median(delays_S))
    # Sizes of the host, none or at least two; the others are the device's.
    found = [_fit(clips_S, base_S, of_host, jitter_s) for of_host in (0, *range(2, len(clips_S) - 1))]
    without, least = found[0], min(found, key=lambda each: each[0])
    return least[1] if _LEAST_GAIN * least[0] < without[0] else without[1]


def _fit(
    clips_S: NDArray[np.float64], base_S: NDArray[np.float64], of_host: int, jitter_s: float
) -> tuple[float, StepFit]:
    """Fit with the first sizes as the host's. Returns the sum of squared relative errors, and the fit."""
    host_s = float(np.median(base_S[:of_host])) if of_host else 0.0
    c0_s, k_s = _line(clips_S[of_host:], base_S[of_host:])
    errors_S = np.maximum(host_s, c0_s + k_s * clips_S) / base_S - 1
    return float((errors_S**2).sum()), StepFit(c0_s, k_s, host_s, jitter_s, float(abs(errors_S).max()))


def _line(clips_S: NDArray[np.float64], base_S: NDArray[np.float64]) -> tuple[float, float]:
    rows_S2 = np.stack([1 / base_S, clips_S / base_S], axis=1)
    c0_s, k_s = np.linalg.lstsq(rows_S2, np.ones(len(clips_S)), rcond=None)[0]
    if c0_s < 0:
        share_S = clips_S / base_S
        return 0.0, float(share_S.sum() / (share_S**2).sum())
    return float(c0_s), float(k_s)


def exponential_mean_s(times_s: Sequence[float]) -> float:
    """Return the mean of the exponential delay on top of a constant time, from the quartiles, which outliers do not move."""
    low, high = np.percentile(times_s, (25, 75))
    return float(high - low) / _LN_3

"""Limits of a y axis that a few extreme values do not decide, and marks for the values outside."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OUTER = 0.05
"""Part of the values at each end that may lie outside."""

_MARGIN = 0.05


@dataclass(frozen=True)
class Limits:
    """Limits of an axis; some values lie outside."""

    low: float
    high: float


def robust_limits(values: Sequence[float]) -> Limits | None:
    """Return limits that leave out extreme values; None if no value is extreme.

    Extreme: further from the middle 90% of the values than these are wide, and than their largest is from zero. Of a few values,
    all but the two outermost are the middle.
    """
    ordered = sorted(value for value in values if math.isfinite(value))
    if len(ordered) < 4:
        return None
    last = len(ordered) - 1
    low, high = ordered[math.ceil(_OUTER * last)], ordered[math.floor((1 - _OUTER) * last)]
    reach = max(high - low, abs(low), abs(high))
    inside = [value for value in ordered if low - reach <= value <= high + reach]
    if len(inside) == len(ordered):
        return None
    margin = _MARGIN * ((inside[-1] - inside[0]) or abs(inside[0]) or 1.0)
    return Limits(inside[0] - margin, inside[-1] + margin)


def mark_outside(axes: "Axes", limits: Limits, steps: Sequence[int], values: Sequence[float], colour: str) -> None:
    """Mark each value outside at the edge of the axis, and write the most extreme of each side beside its mark."""
    for above in (True, False):
        outside = [
            (step, value)
            for step, value in zip(steps, values, strict=True)
            if math.isfinite(value) and (value > limits.high if above else value < limits.low)
        ]
        if not outside:
            continue
        edge, marker = (0.985, "^") if above else (0.015, "v")
        axes.plot(
            [step for step, _ in outside],
            [edge] * len(outside),
            linestyle="",
            marker=marker,
            markersize=6,
            color=colour,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )
        step, value = (max if above else min)(outside, key=lambda each: each[1])
        more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
        left = step > sum(axes.get_xlim()) / 2
        axes.annotate(
            f"{value:.3g} at {step:,}{more}",
            (step, edge),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-7 if left else 7, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=7,
            color=colour,
        )

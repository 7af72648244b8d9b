"""Draw the charts of a run's records for its report."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .charts import BLUE, GREEN, GREY, ORANGE, PURPLE, add_legend, add_time_axis, draw_schedule, svg_chart
from .history import History, Record, values_of
from .robust_axis import mark_outside, robust_limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The template puts two wide charts into the first row and three narrow ones into each further row.
_WIDE, _WIDE_IN, _NARROW_IN = 2, (5.2, 3.1), (3.8, 2.7)
_RATE = "Learning rate"


@dataclass(frozen=True)
class Curve:
    label: str
    records: list[Record]
    key: str
    colour: str
    style: str = "-"
    marker: str = ""
    scale: float = 1.0
    """Factor from the record's unit to the chart's."""

    @property
    def has_values(self) -> bool:
        return any(map(math.isfinite, self.values()[1]))

    def values(self) -> tuple[list[int], list[float]]:
        """Return steps and values."""
        steps, values = values_of(self.records, self.key)
        return steps, [value * self.scale for value in values]


@dataclass(frozen=True)
class Chart:
    title: str
    curves: list[Curve]
    bottom: float | None = None
    """Limits of the y axis; None: by the values, without extreme ones."""
    top: float | None = None


def run_charts(history: History) -> list[str]:
    """Return the charts that have values as SVG elements."""
    charts = [
        replace(chart, curves=curves)
        for chart in _charts(history)
        if (curves := [curve for curve in chart.curves if curve.has_values])
    ]
    return [_svg(chart, history, *(_WIDE_IN if number < _WIDE else _NARROW_IN)) for number, chart in enumerate(charts)]


def _charts(history: History) -> list[Chart]:
    """Return all charts. Curves of one chart differ in colour and in marker or line style, for readers who see no colours."""
    train, evaluation = history.train, history.evaluation
    return [
        Chart(
            "Loss", [Curve("train", train, "loss", BLUE), Curve("validation", evaluation, "loss", ORANGE, marker="o")]
        ),
        Chart(
            "Accuracy [%]",
            [
                Curve("train top-1", train, "top1_percent", BLUE),
                Curve("validation top-1", evaluation, "top1_percent", ORANGE, marker="o"),
                Curve("validation right order-pair", evaluation, "order_group_percent", GREEN, "--", "s"),
            ],
            -2,
            102,
        ),
        Chart(_RATE, [Curve("taken", train, "learning_rate", BLUE)]),
        Chart("Throughput [clips/s]", [Curve("clips/s", train, "clips_per_s", GREEN)], bottom=0),
        Chart("Input stall [% of time]", [Curve("input stall", train, "input_wait_percent", ORANGE)], -2, 102),
        Chart(
            "Time per step [ms]",
            [
                Curve("forward", train, "forward_s", BLUE, scale=1e3),
                Curve("backward", train, "backward_s", ORANGE, "--", scale=1e3),
                Curve("wait for the reduction", train, "reduction_wait_s", PURPLE, ":", scale=1e3),
                Curve("optimizer", train, "optimizer_s", GREEN, "-.", scale=1e3),
            ],
            bottom=0,
        ),
        Chart(
            "Own time of the ranks [ms per step]",
            [
                Curve("median", train, "busy_p50_s", BLUE, scale=1e3),
                Curve("90th percentile", train, "busy_p90_s", GREEN, "--", scale=1e3),
                Curve("slowest", train, "busy_max_s", ORANGE, ":", scale=1e3),
            ],
            bottom=0,
        ),
        Chart("Model FLOPs utilization [%]", [Curve("MFU", train, "mfu_percent", PURPLE)], bottom=0),
    ]


def _svg(chart: Chart, history: History, width_in: float, height_in: float) -> str:
    def draw(axes: "Axes") -> None:
        planned = history.schedule if chart.title == _RATE else None
        if planned is not None:
            draw_schedule(axes, *planned)
        for curve in chart.curves:
            steps, values = curve.values()
            marker = curve.marker or ("." if len(steps) == 1 else "")
            axes.plot(
                steps, values, curve.style, color=curve.colour, marker=marker, markersize=4, lw=1.6, label=curve.label
            )
        for step in history.resumed_at:
            axes.axvline(step, color=GREY, lw=0.8, ls=":")
        if planned is None:
            add_time_axis(axes, *_times(history))
        _set_limits(axes, chart)
        if len(chart.curves) > 1 or planned is not None:
            add_legend(axes)

    return svg_chart(chart.title, draw, width_in, height_in)


def _set_limits(axes: "Axes", chart: Chart) -> None:
    """Limit the y axis as the chart says, else by the values without extreme ones, which get a mark."""
    limits = None
    if chart.top is None:
        limits = robust_limits([value for curve in chart.curves for value in curve.values()[1]])
    if limits is not None:
        if chart.bottom is not None:
            limits = replace(limits, low=chart.bottom)
        axes.set_ylim(limits.low, limits.high)
        for curve in chart.curves:
            mark_outside(axes, limits, *curve.values(), curve.colour)
    elif chart.bottom is not None or chart.top is not None:
        axes.set_ylim(chart.bottom, chart.top)


def _times(history: History) -> tuple[list[int], list[float]]:
    """Return steps and the time that each was reached, of the training records."""
    return [record["step"] for record in history.train], [record["elapsed_s"] for record in history.train]

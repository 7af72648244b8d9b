"""Draw the charts of a run's records for its report."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .charts import BLUE, GREEN, GREY, ORANGE, add_legend, draw_schedule, svg_chart
from .history import History, Record, values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The template puts two wide charts into the first row and three narrow ones into each further row.
_WIDE, _WIDE_IN, _NARROW_IN = 2, (5.2, 2.9), (3.8, 2.5)
_RATE = "Learning rate"


@dataclass(frozen=True)
class Curve:
    label: str
    records: list[Record]
    key: str
    colour: str
    style: str = "-"
    marker: str = ""

    @property
    def has_values(self) -> bool:
        return any(map(math.isfinite, values_of(self.records, self.key)[1]))


@dataclass(frozen=True)
class Chart:
    title: str
    curves: list[Curve]
    bottom: float | None = None
    """Limits of the y axis; None: by the values."""
    top: float | None = None


def run_charts(history: History) -> list[str]:
    """Return the charts that have values as SVG elements."""
    charts = [
        Chart(chart.title, curves, chart.bottom, chart.top)
        for chart in _charts(history)
        if (curves := [curve for curve in chart.curves if curve.has_values])
    ]
    return [_svg(chart, history, *(_WIDE_IN if number < _WIDE else _NARROW_IN)) for number, chart in enumerate(charts)]


def _charts(history: History) -> list[Chart]:
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
                Curve("validation right order-pair", evaluation, "order_group_percent", ORANGE, "--", "o"),
            ],
            -2,
            102,
        ),
        Chart(_RATE, [Curve("taken", train, "learning_rate", BLUE)]),
        Chart("Throughput [clips/s]", [Curve("clips/s", train, "clips_per_s", GREEN)], bottom=0),
        Chart("Input stall [% of time]", [Curve("input stall", train, "input_wait_percent", GREEN)], -2, 102),
    ]


def _svg(chart: Chart, history: History, width_in: float, height_in: float) -> str:
    def draw(axes: "Axes") -> None:
        planned = history.schedule if chart.title == _RATE else None
        if planned is not None:
            draw_schedule(axes, *planned)
        for curve in chart.curves:
            steps, values = values_of(curve.records, curve.key)
            marker = curve.marker or ("." if len(steps) == 1 else "")
            axes.plot(
                steps, values, curve.style, color=curve.colour, marker=marker, markersize=4, lw=1.6, label=curve.label
            )
        for step in history.resumed_at:
            axes.axvline(step, color=GREY, lw=0.8, ls=":")
        if chart.bottom is not None or chart.top is not None:
            axes.set_ylim(chart.bottom, chart.top)
        if len(chart.curves) > 1 or planned is not None:
            add_legend(axes)

    return svg_chart(chart.title, draw, width_in, height_in)

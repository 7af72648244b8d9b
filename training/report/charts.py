"""Charts in one style, for report.html and for the learning rate of a plan."""

import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from training.schedule import Schedule

# matplotlib is imported inside functions: only rank 0 draws, once.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours (Color Universal Design, 2008), which people with any kind of colour blindness tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#5f6773"
_INK, _GRID, _EDGE = "#1c2430", "#e3e7ec", "#b9c0ca"
_CURVE_POINTS = 600


def new_chart(title: str, width_in: float, height_in: float, x_title: str = "step") -> tuple["Figure", "Axes"]:
    """Return an empty chart."""
    # At its first import on a machine, matplotlib logs that it builds a font cache.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10, color=_INK, fontweight="bold")
    axes.set_xlabel(x_title, fontsize=9, color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.tick_params(labelsize=8, colors=GREY, length=3)
    axes.grid(color=_GRID, lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_EDGE)
    return figure, axes


def add_legend(axes: "Axes") -> None:
    axes.legend(fontsize=8, frameon=False, labelcolor=_INK)


def svg_chart(
    title: str, draw: Callable[["Axes"], None], width_in: float, height_in: float, x_title: str = "step"
) -> str:
    """Return a chart as an SVG element, without the header and the metadata that name web addresses."""
    import matplotlib

    # Text stays text. Ids must differ between charts, or one chart would use the clip paths of another.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure, axes = new_chart(title, width_in, height_in, x_title)
        draw(axes)
        file = StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Namespaces are implied inside HTML. The ids of groups are the same in every chart, and unused.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)
    return re.sub(r' id="[\w.]+_\d+"', "", svg)


def add_time_axis(axes: "Axes", steps: Sequence[int], elapsed_s: Sequence[float]) -> None:
    """Add an axis of wall-clock time above the one of steps. `steps` grow, and `elapsed_s` is the time that each was reached."""
    if len(steps) < 2:
        return
    low, high = axes.get_xlim()
    unit, unit_s = next((each for each in (("h", 3600.0), ("min", 60.0)) if elapsed_s[-1] >= 5 * each[1]), ("s", 1.0))
    from matplotlib.ticker import MaxNLocator

    times = MaxNLocator(nbins=6).tick_values(elapsed_s[0] / unit_s, elapsed_s[-1] / unit_s)
    ticks = [
        (step, f"{time:g}")
        for time in times
        if elapsed_s[0] <= time * unit_s <= elapsed_s[-1]
        and low <= (step := _step_at(time * unit_s, steps, elapsed_s)) <= high
    ]
    top = axes.secondary_xaxis("top")
    top.set_xticks([step for step, _ in ticks], labels=[text for _, text in ticks])
    top.set_xlabel(f"time [{unit}]", fontsize=9, color=GREY)
    top.tick_params(labelsize=8, colors=GREY, length=3)
    top.spines["top"].set_color(_EDGE)


def _step_at(time_s: float, steps: Sequence[int], elapsed_s: Sequence[float]) -> float:
    """Return the step that was reached at a time, interpolated."""
    after = min(max(1, bisect_left(elapsed_s, time_s)), len(steps) - 1)
    (before_s, after_s), (before, reached) = elapsed_s[after - 1 : after + 1], steps[after - 1 : after + 1]
    part = (time_s - before_s) / (after_s - before_s) if after_s > before_s else 0.0
    return before + part * (reached - before)


def draw_schedule(axes: "Axes", schedule: Schedule, steps_per_epoch: float) -> None:
    """Draw the learning rate of a whole run, with an axis for epochs, and mark milestones and the end of the warm-up."""
    marks = _marks(schedule)
    step_P = _points(schedule, marks)
    axes.plot(step_P, [schedule.learning_rate(step) for step in step_P], color=GREY, lw=1.2, label="planned")
    for step in marks:
        axes.axvline(step, color=_EDGE, lw=0.9, ls="--")
        axes.annotate(
            f" {step:,}",
            (step, 0.5),
            xycoords=("data", "axes fraction"),
            va="center",
            fontsize=7,
            color=GREY,
            rotation=90,
        )
    axes.set_ylim(bottom=0)

    def epochs_of(steps: Any) -> Any:
        return steps / steps_per_epoch

    def steps_of(epochs: Any) -> Any:
        return epochs * steps_per_epoch

    epochs = axes.secondary_xaxis("top", functions=(epochs_of, steps_of))
    epochs.set_xlabel("epoch", fontsize=9, color=GREY)
    epochs.tick_params(labelsize=8, colors=GREY, length=3)
    epochs.spines["top"].set_color(_EDGE)


def schedule_figure(schedule: Schedule, steps_per_epoch: float) -> "Figure":
    """Return the learning rate of a run as a figure."""
    title = f"Learning rate: peak {schedule.peak:g}, {schedule.decay}, {schedule.total_steps:,} steps"
    figure, axes = new_chart(title, 7.2, 3.8)
    draw_schedule(axes, schedule, steps_per_epoch)
    return figure


def _marks(schedule: Schedule) -> list[int]:
    milestones = schedule.milestone_steps if schedule.decay == "step" else ()
    return sorted({step for step in (schedule.warmup_steps, *milestones) if 0 < step < schedule.total_steps})


def _points(schedule: Schedule, marks: Sequence[int]) -> list[int]:
    """Return the steps to draw a schedule at: evenly spread ones, and both sides of each mark."""
    last = schedule.total_steps - 1
    spread = {round(last * point / _CURVE_POINTS) for point in range(_CURVE_POINTS + 1)}
    return sorted(spread | {step for mark in marks for step in (mark - 1, mark)})

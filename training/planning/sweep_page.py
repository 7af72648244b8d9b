"""Write the comparison of world sizes as a page with plots that needs no other file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.atomic_write import write_text
from training.report.charts import BLUE, GREEN, GREY, ORANGE, add_legend, svg_chart

from .on_cluster import OnCluster, Point
from .run_text import MEANING, describe_run, rows_of, titles_of
from .simulator.run import Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEMPLATE = Path(__file__).with_name("sweep.html")
_COLORS = (BLUE, "#7aa6d8", "#b9c0ca", ORANGE, "#8a5fa8", "#c9a227", "#b03a48", GREEN, "#7cc49a", GREY, "#1c2430")
"""One for each term."""


def write_page(path: Path, name: str, found: OnCluster, points: Sequence[Point]) -> None:
    """Write the page of a sweep."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    figures = found.cluster.figures
    fields = {
        "title": f"{name} on {found.cluster.name}",
        # matplotlib escapes the text in its SVG elements.
        "charts": [Markup(svg) for svg in _charts(points)],
        "titles": titles_of(points),
        "rows": rows_of(points, found.cluster["gpus_per_node"]),
        "refused": [f"{point.world:,}: {point.problem}" for point in points if point.problem is not None],
        "plan": "\n".join(describe_run(found)),
        "figures": [(key, str(figure.value), figure.sure, figure.source) for key, figure in figures.items()],
    }
    write_text(path, environment.from_string(_TEMPLATE.read_text()).render(fields))


def _charts(points: Sequence[Point]) -> list[str]:
    runs = [(point.world, point.simulation) for point in points if point.simulation is not None]
    if not runs:
        return []
    return [
        svg_chart("Time to train, 80% interval [min]", lambda axes: _draw_time(axes, runs), 5.4, 3.4, "processes"),
        svg_chart("Efficiency [%]", lambda axes: _draw_efficiency(axes, runs), 5.4, 3.4, "processes"),
        svg_chart("Shares of the time to train [%]", lambda axes: _draw_terms(axes, runs), 11.0, 3.8, "processes"),
    ]


def _draw_time(axes: "Axes", runs: Sequence[tuple[int, Simulation]]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    _logarithmic(axes, runs)
    axes.set_yscale("log")
    worlds = [world for world, _ in runs]
    times = [run.time_to_train_s for _, run in runs]
    axes.fill_between(
        worlds, [time.low / 60 for time in times], [time.high / 60 for time in times], color=BLUE, alpha=0.2, lw=0
    )
    axes.plot(worlds, [time.centre / 60 for time in times], color=BLUE, lw=1.6, marker="o", ms=3.5, label="simulated")
    first_world, first = runs[0]
    ideal = [first.time_to_train_s.centre / 60 * first_world / world for world in worlds]
    axes.plot(worlds, ideal, color=GREY, lw=1, ls="--", label="in proportion to the smallest")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    add_legend(axes)


def _draw_efficiency(axes: "Axes", runs: Sequence[tuple[int, Simulation]]) -> None:
    _logarithmic(axes, runs)
    axes.plot(
        [world for world, _ in runs], [100 * run.efficiency for _, run in runs], color=GREEN, lw=1.6, marker="o", ms=3.5
    )
    axes.set_ylim(0, 105)


def _draw_terms(axes: "Axes", runs: Sequence[tuple[int, Simulation]]) -> None:
    # The grid behind the bars.
    axes.set_axisbelow(True)
    places = range(len(runs))
    bottom = [0.0] * len(runs)
    for (name, meaning), color in zip(MEANING.items(), _COLORS, strict=True):
        shares = [100 * run.terms[name].seconds / run.time_to_train_s.centre for _, run in runs]
        if max(shares) >= 0.5:
            axes.bar(places, shares, bottom=bottom, color=color, width=0.7, label=meaning)
            bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
    axes.set_xticks(list(places), [f"{world:,}" for world, _ in runs])
    axes.set_xlim(-0.6, len(runs) * 1.45)
    add_legend(axes)


def _logarithmic(axes: "Axes", runs: Sequence[tuple[int, Simulation]]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks([world for world, _ in runs], [f"{world:,}" for world, _ in runs], rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())

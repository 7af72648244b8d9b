"""Draw the simulator's validations, for benchmarks/simulator.py --chart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.report.charts import BLUE, GREY, ORANGE, add_legend

_BAND_PERCENT = 10


def write_chart(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw errors over the GPUs of MLPerf's systems, and published scaling next to predicted."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    steps, scaling = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_steps(steps, [row for row in rows if "proportional_error_percent" in row])
    _draw_scaling(scaling, [row for row in rows if "with_experience_percent" in row])
    # The same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "simulator"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_steps(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    gpus = [row["gpus"] for row in rows]
    axes.axhspan(-_BAND_PERCENT, _BAND_PERCENT, color=BLUE, alpha=0.1, lw=0)
    axes.axhline(0, color=GREY, lw=0.8)
    proportional = [row["proportional_error_percent"] for row in rows]
    axes.scatter(gpus, proportional, color=ORANGE, s=18, marker="x", label="in proportion to one node")
    axes.scatter(gpus, [row["error_percent"] for row in rows], color=BLUE, s=18, label="c0 + k x images + exposed")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("predicted step / published, less 1 [%]")
    axes.set_title("MLPerf ResNet-50", loc="left", fontsize=10, fontweight="bold")
    add_legend(axes)


def _draw_scaling(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    places = range(len(rows))
    for shift, key, color in (
        (-0.27, "published_percent", GREY), (0.0, "predicted_percent", ORANGE), (0.27, "with_experience_percent", BLUE),
    ):  # fmt: skip
        heights = [row[key] for row in rows]
        axes.bar(
            [place + shift for place in places],
            heights,
            0.25,
            color=color,
            label=key.removesuffix("_percent").replace("_", " "),
        )
    names = [row["run"].partition(", ")[2].partition(",")[0] for row in rows]
    axes.set_xticks(list(places), names, fontsize=8)
    axes.set_ylim(0, 130)
    axes.set_title("Scaling efficiency [%] on 512 and 256 P100", loc="left", fontsize=10, fontweight="bold")
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")

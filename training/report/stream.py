"""Tables and curves of a continuous evaluation (stream.json of a run folder), for the terminal and for report.html."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .charts import BLUE, GREEN, GREY, ORANGE, add_legend, svg_chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]

_TITLES = {"last_frame": "last frame", "mean_of_4": "mean of 4", "mean_of_8": "mean of 8"}

_DRAWN = "mean_of_4"
"""Reading of the stream's logits whose curve is shown."""

_COLOURS = (ORANGE, BLUE, GREEN, GREY)


def read_stream(path: Path) -> Record | None:
    """Return the record in a stream.json; None if there is none, or if it is not what evaluate.py writes."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.keys() >= {"source", "step", "stream", "early"} else None


def early_chart(record: Record) -> str:
    """Draw the curves of early recognition as an SVG element."""

    def draw(axes: "Axes") -> None:
        for number, (label, values) in enumerate(early_curves(record)):
            # The stream first, dashed: its colour is that of the same network on clips.
            colour, style = _COLOURS[max(0, number - 1) % len(_COLOURS)], "--" if number == 0 else "-"
            axes.plot(
                record["early"]["seen_percent"],
                values,
                style,
                color=colour,
                marker="o",
                markersize=4,
                lw=1.6,
                label=label,
            )
        axes.set_ylim(-2, 102)
        axes.set_xticks(record["early"]["seen_percent"])
        add_legend(axes)

    return svg_chart("Early recognition: top-1 [%]", draw, 10.8, 4.2, "part of the video that was seen [%]")


def early_curves(record: Record) -> list[tuple[str, list[float]]]:
    """Return (label, top-1 after each part) of the curves to show: the streams' first, at the middle one of the distances."""
    row = record["stream"][len(record["stream"]) // 2]
    own, *_ = record["early"]["curves"]
    label = f"{own['source']} ({own['network']}), stream, distance {row['distance']}, {_TITLES[_DRAWN]}"
    return [(label, row["early_percent"][_DRAWN])] + [
        (
            f"{curve['source']} ({curve['network']}), {curve['num_frames']} frames of what was seen",
            curve["top1_percent"],
        )
        for curve in record["early"]["curves"]
    ]


def stream_table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the table over frame distances."""
    titles = ["distance", "frames/clip", *(f"{title} [%]" for title in _TITLES.values()), "clips under 8 frames"]
    keys = [f"{name}_percent" for name in _TITLES]
    rows = [
        [
            str(row["distance"]),
            f"{row['frames_per_clip']:.1f}",
            *(f"{row[key]:.1f}" for key in keys),
            str(row["clips_shorter_than_8"]),
        ]
        for row in record["stream"]
    ]
    return titles, rows


def early_table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the table of early recognition."""
    titles = ["top-1 [%] after", *(f"{percent}%" for percent in record["early"]["seen_percent"])]
    return titles, [[label, *(f"{value:.1f}" for value in values)] for label, values in early_curves(record)]


def as_text(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as lines to read, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if at == 0 else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (titles, *rows)
    )

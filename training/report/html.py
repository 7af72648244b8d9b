"""report.html: a run's curves and results on one page that needs nothing else."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from runtime.atomic_write import write_text
from training.runs.run_folder import RunFolder
from training.schedule import Schedule

from .charts import BLUE, GREEN, GREY, ORANGE, add_legend, draw_schedule, svg_chart
from .history import History, Record, _values

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_BAD_CLIPS_SHOWN = 20


def write_report(folder: RunFolder) -> None:
    """Write the report of what the folder holds, be it a finished run or one that was stopped before its first record."""
    history = History.read(folder)
    body = [
        _heading(folder.path.name, history),
        _summary(history),
        _curves(history),
        _evaluations(history),
        _bad_clips(history.bad_clips),
        _configuration(folder.config),
        _provenance(folder.provenance),
    ]
    page = _PAGE.format(title=html.escape(folder.path.name), style=_STYLE, body="\n".join(body))
    write_text(folder.report, page)


# ------------------------------------------------------------------------------------------------------------------ history


# ------------------------------------------------------------------------------------------------------------------ summary


def _heading(run_id: str, history: History) -> str:
    status = history.status
    total = f" of {history.end['step']:,}" if history.end is not None else ""
    starts = f", in {len(history.starts)} starts" if len(history.starts) > 1 else ""
    return (
        f'<header><h1>{html.escape(run_id)}</h1><p><span class="status {status.split()[0]}">{status}</span> '
        f"after {history.steps:,}{total} steps{starts}</p></header>"
    )


def _summary(history: History) -> str:
    cards = [*_accuracy_cards(history.evaluation), *_speed_cards(history)]
    failed = [record for record in history.checkpoint if "failed" in record]
    notes = [f"No checkpoint at step {record['step']:,}: {html.escape(str(record['failed']))}" for record in failed]
    if not history.train:
        notes.append("The run was stopped before its first training record.")
    return (
        '<section class="cards">'
        + "".join(
            f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
            for label, value in cards
        )
        + "</section>"
        + "".join(f'<p class="note">{note}</p>' for note in notes)
    )


def _accuracy_cards(evaluations: list[Record]) -> list[tuple[str, str]]:
    if not evaluations:
        return [("validation: not evaluated yet", "–")]
    last = evaluations[-1]
    cards = [
        ("final validation top-1", _percent(last.get("top1_percent"))),
        ("final validation top-5", _percent(last.get("top5_percent"))),
    ]
    if "order_group_percent" in last:
        cards.append(("final right order-pair", _percent(last["order_group_percent"])))
    best = max(evaluations, key=lambda record: record.get("top1_percent", -math.inf))
    cards.append((f"best validation top-1, at step {best['step']:,}", _percent(best.get("top1_percent"))))
    return cards


def _speed_cards(history: History) -> list[tuple[str, str]]:
    cards = [("total time", _duration(history.duration_s))]
    _, clips_per_s = _values(history.train, "clips_per_s")
    if clips_per_s:
        cards.append(("clips/s, median of the records", f"{median(clips_per_s):,.1f}"))
    if history.starts:
        newest = history.starts[-1]
        cards.append(("world size", f"{newest.get('world_size', '–')}"))
        cards.append(("backend", f"{newest.get('backend', '–')}"))
    return cards


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}%"


def _duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s` or `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


# ------------------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    label: str
    records: list[Record]
    key: str
    colour: str
    style: str = "-"
    marker: str = ""


def _curves(history: History) -> str:
    train, evaluation = history.train, history.evaluation
    charts = [
        ("Loss", [Curve("train", train, "loss", BLUE), Curve("validation", evaluation, "loss", ORANGE, marker="o")]),
        (
            "Accuracy [%]",
            [
                Curve("train top-1", train, "top1_percent", BLUE),
                Curve("validation top-1", evaluation, "top1_percent", ORANGE, marker="o"),
                Curve("validation right order-pair", evaluation, "order_group_percent", ORANGE, "--", "o"),
            ],
        ),
        ("Learning rate", [Curve("taken", train, "learning_rate", BLUE)]),
        ("Clips a second", [Curve("clips/s", train, "clips_per_s", GREEN)]),
        ("Waiting for input [% of time]", [Curve("input wait", train, "input_wait_percent", GREEN)]),
    ]
    drawable = [
        (title, drawn) for title, curves in charts if (drawn := [curve for curve in curves if _drawable(curve)])
    ]
    if not drawable:
        return ""
    resumed = [record["step"] for record in history.starts[1:] if record["step"] > 0]
    newest = history.starts[-1] if history.starts else {}
    figures = [
        f"<figure>{_chart(title, curves, resumed, 5.2 if place < 2 else 3.8, newest)}</figure>"  # two wide ones on top
        for place, (title, curves) in enumerate(drawable)
    ]
    note = '<p class="hint">Dotted vertical lines: the run was resumed there.</p>' if resumed else ""
    return f'<section><h2>Curves</h2><div class="charts">{"".join(figures)}</div>{note}</section>'


def _drawable(curve: Curve) -> bool:
    return any(map(math.isfinite, _values(curve.records, curve.key)[1]))


def _chart(title: str, curves: list[Curve], resumed: list[int], width_in: float, start: Record) -> str:
    """An SVG element of the curves over steps; `start`: the newest start's record, which has the schedule."""

    def draw(axes: "Axes") -> None:
        planned = title == "Learning rate" and _drawn_schedule(axes, start)
        for curve in curves:
            steps, values = _values(curve.records, curve.key)
            marker = curve.marker or ("." if len(steps) == 1 else "")
            axes.plot(
                steps, values, curve.style, color=curve.colour, marker=marker, markersize=4, lw=1.6, label=curve.label
            )
        for step in resumed:
            axes.axvline(step, color=GREY, lw=0.8, ls=":")
        if title.startswith(("Accuracy", "Waiting")):
            axes.set_ylim(-2, 102)
        elif title.startswith("Clips"):
            axes.set_ylim(bottom=0)
        if len(curves) > 1 or planned:
            add_legend(axes)

    return svg_chart(title, draw, width_in, 2.9 if width_in > 5 else 2.5)


def _drawn_schedule(axes: "Axes", start: Record) -> bool:
    """Draw the schedule that a start's record tells of, where it does (older runs' do not)."""
    told = start.get("schedule")
    if not isinstance(told, dict):
        return False
    schedule = Schedule(**told | {"milestone_steps": tuple(told["milestone_steps"])})
    draw_schedule(axes, schedule, start["steps_per_epoch"])
    return True


# ------------------------------------------------------------------------------------------------------- tables and details


_EVALUATION_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("step", "step", ",d"),
    ("epoch", "epoch", ".2f"),
    ("top1_percent", "top-1 [%]", ".2f"),
    ("top5_percent", "top-5 [%]", ".2f"),
    ("mean_class_percent", "mean class [%]", ".2f"),
    ("order_group_percent", "right order-pair [%]", ".2f"),
    ("loss", "loss", ".4f"),
    ("clips", "clips", ",d"),
    ("missing", "missing", ",d"),
    ("duration_s", "time [s]", ".1f"),
)


def _evaluations(history: History) -> str:
    records = history.evaluation
    if not records:
        return ""
    columns = [column for column in _EVALUATION_COLUMNS if any(column[0] in record for record in records)]
    rows = [[_number(record.get(key), spec) for key, _, spec in columns] for record in records]
    return f"<section><h2>Evaluations</h2>{_table([title for _, title, _ in columns], rows)}</section>"


def _number(value: Any, spec: str) -> str:
    if value is None:
        return "–"
    try:
        return format(value, spec)
    except (TypeError, ValueError):
        return str(value)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells("th", titles)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _bad_clips(records: list[Record]) -> str:
    if not records:
        return ""
    keys = ("split", "row", "replaced_by", "reason")
    rows = [[_number(record.get(key), "") for key in keys] for record in records[:_BAD_CLIPS_SHOWN]]
    more = len(records) - len(rows)
    rest = f'<p class="hint">… and {more:,} more in bad_clips.jsonl</p>' if more else ""
    table = _table(("split", "row", "replaced by", "reason"), rows, kind="texts")
    return f"<section><h2>Undecodable clips: {len(records):,}</h2>{table}{rest}</section>"


def _configuration(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    return f"<details><summary>Configuration</summary><pre>{html.escape(text)}</pre></details>" if text else ""


def _provenance(path: Path) -> str:
    """Which code, packages and hosts each start was made of."""
    if not path.exists():
        return ""
    text = path.read_text()
    try:
        starts = json.loads(text)
    except ValueError:
        starts = None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        content = f"<pre>{html.escape(text)}</pre>"  # not what a run writes: shown as it is
    else:
        content = "".join(_start(number, start) for number, start in enumerate(starts, start=1))
    return f"<details><summary>Provenance</summary>{content}</details>"


def _start(number: int, start: Record) -> str:
    facts = {key: value for key, value in start.items() if key != "git_diff"}
    rows = "".join(f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(_plain(facts[key]))}</dd>" for key in facts)
    diff = str(start.get("git_diff") or "")
    shown = (
        f"<details><summary>Changes since the commit</summary><pre>{html.escape(diff)}</pre></details>" if diff else ""
    )
    return f"<h3>Start {number}</h3><dl>{rows}</dl>{shown}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "–" if value is None else str(value)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5f6773; --line: #e3e7ec; --paper: #fff; --back: #f5f6f8; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 28px 24px 60px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 30px 0 10px; font-size: 17px; }
h3 { margin: 18px 0 6px; font-size: 14px; }
header p { margin: 6px 0 20px; color: var(--soft); }
.status { padding: 2px 10px; border-radius: 10px; font-weight: 600; font-size: 13px; background: #fdebd9; color: #974d0c; }
.status.finished { background: #dcf1e3; color: #1d6b3b; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 12px; }
.card, figure, .scroll, details { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
.card { padding: 12px 16px; }
.card b { display: block; font-size: 23px; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: 13px; }
.note { margin: 14px 0 0; padding: 8px 14px; border-left: 3px solid #d9622b; background: #fdf3ea; overflow-wrap: anywhere; }
.hint { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(6, 1fr); gap: 12px; }
figure { grid-column: span 2; margin: 0; padding: 10px; min-width: 0; }
figure:nth-child(-n+2) { grid-column: span 3; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-size: 13px; font-weight: 600; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
.numbers th, .numbers td { text-align: right; }
.texts th, .texts td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
details { margin-top: 12px; padding: 10px 16px; }
details details { margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: 10px 0 0; overflow-x: auto; font: 12.5px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; font-size: 14px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 760px) { figure, figure:nth-child(-n+2) { grid-column: span 6; } }
@media (max-width: 600px) { dl { grid-template-columns: 1fr; } }
@media print { body { background: none; max-width: none; } figure, .card { break-inside: avoid; } }
"""

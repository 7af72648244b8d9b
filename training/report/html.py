"""Write report.html: a run's curves and scores on one page that needs no other file."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import run_layout
from runtime.atomic_write import write_text

from .comparison import compare
from .curves import run_charts
from .failures import failure_parts
from .history import History, Record
from .rates import rates_of
from .status import Status, read_json, read_status
from .stream import early_chart, early_table, read_stream, stream_table

_TEMPLATE = Path(__file__).with_name("template.html")
_BAD_CLIPS_SHOWN = 20

# Key of the record, title, format.
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


@dataclass(frozen=True)
class Table:
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    left_out: int = 0
    """Number of rows that are not shown."""


@dataclass(frozen=True)
class Stream:
    """The run's last evaluation on a continuous stream."""

    title: str
    chart: str
    distances: Table
    early: Table
    notes: list[str]


@dataclass(frozen=True)
class Start:
    """One start of the run in provenance.json."""

    facts: list[tuple[str, str]]
    git_diff: str


def write_report(folder: Path) -> Status:
    """Write the report of a run folder, however the run ended, or if it still runs. Returns how it stands."""
    # Only one process needs jinja2, once, at the end.
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text())
    history = History.read(folder)
    status = read_status(folder, history)
    write_text(folder / run_layout.REPORT, template.render(_fields(folder, history, status)))
    return status


def progress_of(history: History) -> str:
    """Return how far a run has come: `after 40 of 360 steps, in 2 starts`."""
    total = f" of {history.total_steps:,}" if history.total_steps is not None else ""
    starts = f", in {len(history.starts)} starts" if len(history.starts) > 1 else ""
    return f"after {history.steps:,}{total} steps{starts}"


def _fields(folder: Path, history: History, status: Status) -> dict[str, Any]:
    """Return the values that the template shows."""
    from markupsafe import Markup

    comparison = compare(folder, history)
    config = folder / run_layout.CONFIG
    return {
        "run_id": folder.name,
        "status": status,
        "progress": progress_of(history),
        "failure": failure_parts(folder) if status.is_failure else [],
        "earlier": _earlier_ends(folder / run_layout.PROVENANCE),
        "cards": [*_accuracy_cards(history.evaluation), *_speed_cards(history)],
        "notes": _notes(history),
        # These SVG elements come from matplotlib, which escapes the text in them.
        "charts": [Markup(svg) for svg in run_charts(history)],
        "resumed": bool(history.resumed_at),
        "comparison": Table(("term", "planned", "measured", "ratio", ""), [row.cells for row in comparison.rows]),
        "comparison_note": comparison.note,
        "evaluations": _evaluations(history.evaluation),
        "stream": _stream(folder / run_layout.STREAM),
        "bad_clips": _bad_clips(history.bad_clips),
        "configuration": config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
        "provenance": _provenance(folder / run_layout.PROVENANCE),
    }


def _accuracy_cards(evaluations: list[Record]) -> list[tuple[str, str]]:
    """Return (label, value) of each card."""
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
    rates = rates_of(history)
    if rates is not None:
        cards.append(("clips/s, whole job", f"{rates.whole_job:,.1f}"))
        cards.append(("clips/s, training without evaluations", f"{rates.training:,.1f}"))
        cards.append(("clips/s, compute without input stall", f"{rates.compute:,.1f}"))
    if history.starts:
        newest = history.starts[-1]
        cards.append(("world size", f"{newest.get('world_size', '–')}"))
        cards.append(("backend", f"{newest.get('backend', '–')}"))
        cards += [("device", str(newest["device"]))] if newest.get("device") else []
    return cards


def _notes(history: History) -> list[str]:
    failed = [record for record in history.checkpoint if "failed" in record]
    notes = [f"No checkpoint at step {record['step']:,}: {record['failed']}" for record in failed]
    if not history.train:
        notes.append("There is no training record: the run ended before its first one.")
    return notes


def _evaluations(records: list[Record]) -> Table:
    columns = [column for column in _EVALUATION_COLUMNS if any(column[0] in record for record in records)]
    rows = [[_formatted(record.get(key), spec) for key, _, spec in columns] for record in records]
    return Table([title for _, title, _ in columns], rows)


def _stream(path: Path) -> Stream | None:
    """Return what stream.json says; None if there is no such file."""
    from markupsafe import Markup

    record = read_stream(path)
    if record is None:
        return None
    differing = [
        f"{key}={each['here']} (trained: {each['trained']})"
        for key, each in record.get("differs_from_run", {}).items()
        # Always so here.
        if key != "evaluation.clips"
    ]
    return Stream(
        f"step {record['step']:,}, {record['clips']:,} clips",
        Markup(early_chart(record)),
        Table(*stream_table(record)),
        Table(*early_table(record)),
        [f"differs from the run: {', '.join(differing)}"] if differing else [],
    )


def _bad_clips(records: list[Record]) -> Table:
    keys = ("split", "row", "replaced_by", "reason")
    rows = [[_formatted(record.get(key), "") for key in keys] for record in records[:_BAD_CLIPS_SHOWN]]
    return Table(("split", "row", "replaced by", "reason"), rows, left_out=len(records) - len(rows))


def _earlier_ends(provenance: Path) -> Table:
    """Return how the starts before the newest one ended."""
    starts = read_json(provenance)
    rows = [
        [str(number), _formatted(start.get("first_step"), ",d"), str(ended.get("exit_code")), str(ended.get("reason"))]
        for number, start in enumerate(starts if isinstance(starts, list) else [], 1)
        if isinstance(start, dict) and isinstance(ended := start.get("ended"), dict)
    ]
    return Table(("start", "from step", "exit code", "reason"), rows)


def _provenance(path: Path) -> list[Start] | str:
    """Return code, packages and hosts of each start, or the file's text if it is not what a run writes."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    try:
        starts = json.loads(text)
    except ValueError:
        return text
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        return text
    return [
        Start(
            [(str(key), _plain(value)) for key, value in start.items() if key != "git_diff"],
            str(start.get("git_diff") or ""),
        )
        for start in starts
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}%"


def _duration(seconds: float) -> str:
    """Return `1 h 02 min`, `3 min 20 s` or `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _formatted(value: Any, spec: str) -> str:
    if value is None:
        return "–"
    try:
        return format(value, spec)
    except (TypeError, ValueError):
        return str(value)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "–" if value is None else str(value)

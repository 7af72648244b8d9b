"""Put the results of all benchmarks on one page: environment, command, figures with their spread, target, peer, verdict."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

FACTS = ("cpu", "cores", "threads", "load", "load_after", "python", "torch", "date")
"""Fields of a row that describe the machine."""

# Fields of a row that name neither a figure nor what was measured.
_NO_LABEL = (*FACTS, "benchmark")


@dataclass(frozen=True)
class Target:
    """A limit for a figure of the rows whose fields equal `where`."""

    benchmark: str
    where: Mapping[str, Any]
    key: str
    limit: float
    peer: str
    at_most: bool = True

    def fits(self, benchmark: str, row: Row, key: str) -> bool:
        return benchmark == self.benchmark and key == self.key and all(row.get(k) == v for k, v in self.where.items())


TARGETS = (
    Target("step", {"comparison": "training loop / plain loop"}, "ratio", 1.01, "the same step in plain PyTorch"),
    Target("shift", {"mode": "training", "shift": "ours"}, "ratio", 1.10, "the network without a shift"),
    Target("optimizer", {"optimizer": "LARS, ours"}, "ratio_to_fused_sgd", 2.0, "torch's fused SGD"),
    Target("optimizer", {"optimizer": "LARS, ours"}, "ratio_to_timm", 0.5, "timm's LARS"),
    Target("checkpoint", {}, "stall_ratio", 0.20, "a blocking save"),
    Target("input", {"name": "ours, torchcodec"}, "to_its_decoding", 1.3, "decoding alone"),
    Target("end_to_end", {}, "time_ratio", 1.0, "a plain torchvision-style DDP loop"),
)


@dataclass(frozen=True)
class Figure:
    """A measured value: the number itself, or a median with the interval around it."""

    value: float
    low: float | None
    high: float | None

    def show(self) -> str:
        shown = f"{self.value:.4g}"
        return shown if self.low is None else f"{shown} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Line:
    """A figure of a row, as the page shows it."""

    label: str
    key: str
    figure: Figure
    target: Target | None

    @property
    def target_text(self) -> str:
        if self.target is None:
            return ""
        return f"{'at most' if self.target.at_most else 'at least'} {self.target.limit:g}"

    @property
    def verdict(self) -> str:
        """Return `met`, `MISSED`, or `unclear` where the limit lies inside the interval; empty without a target."""
        if self.target is None:
            return ""
        low = self.figure.value if self.figure.low is None else self.figure.low
        high = self.figure.value if self.figure.high is None else self.figure.high
        if not self.target.at_most:
            low, high, limit = -high, -low, -self.target.limit
        else:
            limit = self.target.limit
        return "met" if high <= limit else "MISSED" if low > limit else "unclear"


@dataclass(frozen=True)
class Result:
    """What a program gave."""

    name: str
    command: str
    exit_code: int
    duration_s: float
    rows: Sequence[Row]
    last_line: str = ""
    """Of its output; says why it failed."""


def lines_of(benchmark: str, rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[Line]:
    """Return the figures of rows: all intervals, and single numbers that have a target, of the page or of the row."""
    lines = []
    for row in rows:
        if "check" in row:
            # A row that brings its own target: a comparison with published figures.
            own = Target(benchmark, {}, "value", row["target"], "published figures")
            lines.append(Line(row["check"], "value", Figure(row["value"], None, None), own))
            continue
        label = ", ".join(
            f"{key}={value}"
            for key, value in row.items()
            if key not in _NO_LABEL and isinstance(value, str | int | bool) and not isinstance(value, float)
        )
        for key, value in row.items():
            target = next((target for target in targets if target.fits(benchmark, row, key)), None)
            figure = _figure(value)
            if figure is not None and (figure.low is not None or target is not None):
                lines.append(Line(label, key, figure, target))
    return lines


def _figure(value: Any) -> Figure | None:
    if isinstance(value, Mapping) and value.keys() >= {"median", "low", "high"}:
        return Figure(value["median"], value["low"], value["high"])
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Figure(float(value), None, None)
    return None


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the page's content as JSON values."""
    return [
        {
            "benchmark": result.name,
            "command": result.command,
            "exit_code": result.exit_code,
            "duration_s": round(result.duration_s, 1),
            "last_line": result.last_line,
            "environment": _environment(result.rows),
            "lines": [
                {
                    "label": line.label,
                    "figure": line.key,
                    "value": line.figure.value,
                    "low": line.figure.low,
                    "high": line.figure.high,
                    "target": line.target_text,
                    "peer": line.target.peer if line.target else "",
                    "verdict": line.verdict,
                }
                for line in lines_of(result.name, result.rows)
            ],
        }
        for result in results
    ]


def as_html(results: Sequence[Result]) -> str:
    """Return the page, one file that loads nothing. Missed targets and failed programs come first."""
    every = [(result, lines_of(result.name, result.rows)) for result in results]
    missed = [(result, line) for result, lines in every for line in lines if line.verdict == "MISSED"]
    failed = [result for result in results if result.exit_code != 0]
    summary = "".join(
        f'<p class="missed">MISSED: {_e(result.name)}, {_e(line.label)}: {_e(line.key)} is {_e(line.figure.show())}, '
        f"target {_e(line.target_text)}</p>"
        for result, line in missed
    ) + "".join(
        f'<p class="missed">NOT RUN: {_e(each.name)} ended with {each.exit_code}: {_e(each.last_line)}</p>'
        for each in failed
    )
    return _PAGE.format(
        summary=summary or "<p>No target is missed.</p>", sections="".join(_section(*each) for each in every)
    )


def _section(result: Result, lines: Sequence[Line]) -> str:
    rows = "".join(
        f'<tr class="{line.verdict.lower()}"><td>{_e(line.label)}</td><td>{_e(line.key)}</td><td>{_e(line.figure.show())}</td>'
        f"<td>{_e(line.target_text)}</td><td>{_e(line.target.peer if line.target else '')}</td><td>{line.verdict}</td></tr>"
        for line in lines
    )
    titles = "".join(
        f"<th>{title}</th>" for title in ("row", "figure", "median [interval]", "target", "peer", "verdict")
    )
    environment = ", ".join(f"{key} {value}" for key, value in _environment(result.rows).items())
    return (
        f"<section><h2>{_e(result.name)}</h2><p><code>{_e(result.command)}</code></p>"
        f"<p>{_e(environment or 'no rows')}; took {result.duration_s:.0f} s</p>"
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def _environment(rows: Sequence[Row]) -> dict[str, Any]:
    return {key: rows[0][key] for key in FACTS if rows and key in rows[0]}


def _e(text: str) -> str:
    return html.escape(text)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Benchmarks</title><style>
body {{ margin: 0 auto; max-width: 1200px; padding: 24px 16px; color: #1c2430; font: 15px/1.5 system-ui, sans-serif; }}
code {{ overflow-wrap: anywhere; }} .scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
th, td {{ padding: 5px 10px; border-bottom: 1px solid #e3e7ec; text-align: left; overflow-wrap: anywhere; }}
tr.missed, p.missed {{ background: #f9d9d3; color: #8c2413; font-weight: 600; }} tr.unclear {{ background: #fdf3ea; }}
p.missed {{ padding: 6px 12px; }} tr.met td:last-child {{ color: #1d6b3b; }}
</style></head><body><h1>Benchmarks</h1>
<p>Medians with their intervals. Unclear: the target lies inside the interval. Compare ratios: machines are shared and noisy.</p>
{summary}
{sections}
</body></html>
"""

"""The last lines of a run: one screen with the main results, for readers who see only the end of the output."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .report import errors

Rows = Mapping[str, Mapping[str, Any]]

WIDTH = 150
MOST_ERRORS = 14


def print_summary(report: Mapping[str, Any]) -> None:
    for line in summary(report):
        print(line[:WIDTH], flush=True)


def summary(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines for phases, correctness, figures and errors, in this order."""
    phases: Mapping[str, Mapping[str, Any]] = report["phases"]
    devices = {fields["device"] for entry in phases.values() for fields in rows_of(entry).values()}
    warning = report["warning"]
    yield "=" * 20 + " first light " + "=" * 20
    if warning:
        yield f"!!! {warning} !!!"
    yield f"{' and '.join(sorted(devices)) or 'no device'}; {report['commit']}"
    yield "phases: " + ", ".join(f"{name} {entry['outcome']}" for name, entry in phases.items())
    yield from _correctness(phases)
    yield from _figures(phases)
    yield from _errors(phases)
    if warning:
        yield f"!!! {warning} !!!"


def rows_of(entry: Mapping[str, Any]) -> Rows:
    rows: Rows = entry.get("results", {})
    return rows


def _correctness(phases: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    waits = {title: row["waits"] for title, row in _rows(phases, "waits").items() if "waits" in row}
    yield "waits per step: " + (", ".join(f"{title} {number}" for title, number in waits.items()) or "none measured")
    for name in ("gpu_tests", "dali_tests"):
        tests = Counter(row["outcome"] for row in _rows(phases, name).values() if "outcome" in row)
        yield f"{name}: " + (", ".join(f"{number} {outcome}" for outcome, number in tests.most_common()) or "none run")
    for name in ("equivalence", "ranks", "jobs"):
        compared = {title: row for title, row in _rows(phases, name).items() if "relative" in row}
        far = [f"{title} {row['relative']:.1e}" for title, row in compared.items() if not _is_equal(row)]
        yield f"{name}: {len(compared) - len(far)} of {len(compared)} equal" + (
            f"; NOT: {', '.join(far)}" if far else ""
        )


def _is_equal(row: Mapping[str, Any]) -> bool:
    return bool(row.get("equal", False))


def _figures(phases: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name in ("speed", "peers", "compiled"):
        for title, row in _rows(phases, name).items():
            if "clips_s" in row:
                mfu = f"  MFU {100 * row['mfu']:5.1f}%" if row.get("mfu") else ""
                times = f"{1e3 * row['step_s']:8.2f} ms  host {1e3 * row['host_s']:7.2f} ms"
                yield f"  {title:52s} {row['clips_s']:8.1f} clips/s {times}{mfu}"
    for title, row in _rows(phases, "input").items():
        if "clips_s" in row:
            yield f"  {title}: {row['clips_s']:.1f} clips/s, the first batch after {row['first_batch_s']:.1f} s"
    for title, row in _rows(phases, "scaling").items():
        if "c0_s" in row:
            error = 100 * row["worst_relative_error"]
            yield f"  {title}: c0 {1e3 * row['c0_s']:.2f} ms, k {1e3 * row['k_s']:.3f} ms/clip, within {error:.0f}%"
    for title, row in _rows(phases, "operators").items():
        rates = {key: value for key, value in row.items() if key.endswith("_tb_s")}
        if "step_s" in row:
            yield f"  {title}: {1e3 * row['step_s']:.3f} ms"
        elif rates:
            yield f"  {title}: " + ", ".join(f"{key[:-5]} {value:.2f} TB/s" for key, value in rates.items())


def _errors(phases: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    found = [f"{name}: {title}: {error}" for name, entry in phases.items() for title, error in errors(rows_of(entry))]
    ended = [
        f"{name}: {(entry.get('output', '').strip().splitlines() or [entry['outcome']])[-1]}"
        for name, entry in phases.items()
        if entry["outcome"] not in ("ok", "no time", "not started")
    ]
    lines = ended + found
    yield f"errors: {len(lines)}"
    yield from (f"  {line}" for line in lines[:MOST_ERRORS])
    if len(lines) > MOST_ERRORS:
        yield f"  and {len(lines) - MOST_ERRORS} more in the report"


def _rows(phases: Mapping[str, Mapping[str, Any]], name: str) -> Rows:
    return rows_of(phases.get(name, {}))

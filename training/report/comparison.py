"""Compare a run's plan with what was measured, term by term.

The plan is `plan.json` of the run folder, as `plan.py ... plan.json=outputs/NAME/plan.json` writes it with a cluster. Terms are
those of training.planning, measurements those of metrics.jsonl. Either may lack some: then the table shows what there is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import run_layout

from .history import History, Record
from .rates import Spent, mean_per_step
from .status import read_json

NO_PLAN = (
    "The run folder has no plan to compare with. Before the next run: python plan.py OVERRIDES cluster=NAME run_id=NAME "
    "plan.json=outputs/NAME/plan.json"
)


@dataclass(frozen=True)
class Row:
    """A term with its planned and its measured value, in seconds; None: unknown."""

    term: str
    planned: float | None
    measured: float | None
    unit: str
    """`s`, or `ms/step`."""
    note: str = ""

    @property
    def cells(self) -> list[str]:
        return [self.term, self._shown(self.planned), self._shown(self.measured), self._ratio(), self.note]

    def _shown(self, value_s: float | None) -> str:
        if value_s is None:
            return "–"
        return f"{value_s * 1000:,.1f} ms/step" if self.unit == "ms/step" else f"{value_s:,.1f} s"

    def _ratio(self) -> str:
        if not self.planned or self.measured is None:
            return "–"
        return f"{self.measured / self.planned:.2f}"


@dataclass(frozen=True)
class Comparison:
    rows: list[Row]
    note: str
    """The plan's interval and whether the run lies in it, or that there is no plan."""


def compare(folder: Path, history: History) -> Comparison:
    """Return the terms that plan or records have a value for."""
    plan = read_json(folder / run_layout.PLAN)
    plan = plan if isinstance(plan, dict) else {}
    planned, measured = _planned(plan), _measured(history)
    rows = [
        Row(term, planned.get(term), measured.get(term), unit, note)
        for term, unit, note in _TERMS
        if term in planned or term in measured
    ]
    return Comparison(rows, _note(plan, history))


# Term, unit, what to know of it.
_TERMS: tuple[tuple[str, str, str], ...] = (
    ("whole job", "s", ""),
    ("start-up", "s", "until the first batch is asked for, summed over the starts"),
    ("first step", "s", "its excess over a step"),
    ("evaluations", "s", ""),
    ("checkpoints", "s", "stalls of the training; the last checkpoint whole"),
    ("a step", "ms/step", ""),
    ("compute", "ms/step", "forward, backward and optimizer, without messages of batch norm"),
    ("all-reduce and slowest rank", "ms/step", "from a rank's last gradient to the reduced ones"),
    ("slowest rank", "ms/step", "measured: slowest rank's own time over the median rank's"),
    ("batch norm messages", "ms/step", ""),
    ("input stall", "ms/step", "measured: rank 0's wait for clips"),
    ("experience", "ms/step", "loss that such models miss; no measurement shows it alone"),
)


def _planned(plan: dict[str, Any]) -> dict[str, float]:
    """Return planned seconds by term, of the whole run or per step."""
    found: dict[str, float] = {}
    recipe, rates, time_s = (_mapping(plan.get(key)) for key in ("recipe", "rates", "time_to_train_s"))
    terms: dict[str, float] = {
        name: term["seconds"]
        for name, term in _mapping(plan.get("terms")).items()
        if isinstance(_mapping(term).get("seconds"), int | float)
    }
    total = recipe.get("total_steps") or 0
    if "centre" in time_s:
        found["whole job"] = time_s["centre"]
    for term, name in (
        ("start-up", "start-up"),
        ("first step", "first step"),
        ("evaluations", "evaluations"),
        ("checkpoints", "last checkpoint"),
    ):
        if name in terms:
            found[term] = terms[name]
    if "step_s" in rates:
        found["a step"] = rates["step_s"]
    if not total:
        return found
    if plan.get("steps_s") is not None:
        found["a step"] = plan["steps_s"] / total
    for term, names in (
        ("compute", ("clips", "c0")),
        ("all-reduce and slowest rank", ("gradients", "jitter")),
        ("slowest rank", ("jitter",)),
        ("batch norm messages", ("batch norm",)),
        ("input stall", ("input",)),
        ("experience", ("experience",)),
    ):
        if all(name in terms for name in names):
            found[term] = sum(terms[name] for name in names) / total
    return found


def _measured(history: History) -> dict[str, float]:
    """Return measured seconds by term, of the whole run or per step."""
    train, spent = history.train, Spent.of(history.train)
    found: dict[str, float | None] = {"whole job": history.duration_s if history.starts else None}
    step_s = spent.steps_s / spent.steps if spent.steps else None
    first = [record for record in history.others if record["kind"] == "first_step" and "duration_s" in record]
    if first:
        # The time from each start's first record to its first step.
        begins = [record for record in history.others if record["kind"] == "job_start"] or history.starts
        found["start-up"] = sum(_since(begins, record) - record["duration_s"] for record in first)
        if step_s is not None:
            found["first step"] = sum(record["duration_s"] - step_s for record in first)
    found["evaluations"] = _sum(history.evaluation, "duration_s")
    stalls = [_sum([record], "stall_s", "waited_s") or 0.0 for record in history.checkpoint]
    if history.checkpoint:
        found["checkpoints"] = sum(stalls) + (_sum(history.checkpoint[-1:], "duration_s") or 0.0)
    found["a step"] = step_s
    messages_s = mean_per_step(train, "batch_norm_messages_s")
    parts = [mean_per_step(train, f"{phase}_s") for phase in ("forward", "backward", "optimizer")]
    if all(part is not None for part in parts):
        found["compute"] = sum(part or 0.0 for part in parts) - (messages_s or 0.0)
    found["all-reduce and slowest rank"] = mean_per_step(train, "reduction_wait_s")
    slowest, median = (mean_per_step(train, f"busy_{which}_s") for which in ("max", "p50"))
    if slowest is not None and median is not None:
        found["slowest rank"] = slowest - median
    found["batch norm messages"] = messages_s
    found["input stall"] = spent.input_s / spent.steps if spent.steps else None
    return {term: value for term, value in found.items() if value is not None}


def _note(plan: dict[str, Any], history: History) -> str:
    if not plan:
        return NO_PLAN
    interval = _mapping(plan.get("time_to_train_s"))
    if not interval.keys() >= {"low", "centre", "high"}:
        return "The plan has no time to train: it was made without cluster=NAME"
    low, centre, high = interval["low"], interval["centre"], interval["high"]
    planned = f"Planned: {centre:,.0f} s to train, 80% interval {low:,.0f} to {high:,.0f} s."
    if not history.ended_whole:
        return f"{planned} The run has not ended, so compare the times per step"
    place = "below" if history.duration_s < low else "above" if history.duration_s > high else "inside"
    return f"{planned} Measured: {history.duration_s:,.0f} s, {place} the interval"


def _since(begins: list[Record], record: Record) -> float:
    """Return the time from the last of `begins` before a record until that record."""
    earlier = [each["elapsed_s"] for each in begins if each["elapsed_s"] <= record["elapsed_s"]]
    return float(record["elapsed_s"] - max(earlier, default=0.0))


def _sum(records: list[Record], *keys: str) -> float | None:
    values = [record[key] for record in records for key in keys if isinstance(record.get(key), int | float)]
    return float(sum(values)) if values else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

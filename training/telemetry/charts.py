"""The names under which wandb and TensorBoard chart the numbers of records: the part before the slash is a section of charts."""

from collections.abc import Iterator
from typing import Any

from .step_clock import PHASES

_SECTIONS = {
    "throughput": (
        "clips_per_s", "clips_per_s_per_device", "mfu_percent", "input_wait_percent", "step_s", "eta_s", "peak_memory_bytes",
    ),
    "phases": (*(f"{phase}_s" for phase in PHASES), "batch_norm_messages_s"),
    "ranks": ("busy_p50_s", "busy_p90_s", "busy_max_s", "worst_rank"),
}  # fmt: skip
"""Fields of training records that are not about learning."""

SUMMARIES = {
    "train/loss": "min",
    "evaluation/loss": "min",
    "evaluation/top1_percent": "max",
    "throughput/clips_per_s": "mean",
}
"""The number of a whole run that wandb's table of runs shows; of other charts the last one."""


def chart_numbers(kind: str, values: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Yield the numbers of a record by their names, those of nested values joined by slashes."""
    section_of = {name: section for section, names in _SECTIONS.items() for name in names} if kind == "train" else {}
    for name, value in values.items():
        if isinstance(value, dict):
            yield from chart_numbers(f"{kind}/{name}", value)
        # The time of a record is none of its numbers.
        elif isinstance(value, int | float) and name != "time_s":
            yield f"{section_of.get(name, kind)}/{name}", value

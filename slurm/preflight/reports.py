"""Data that the judge reads and writes: the job's expectations, the reports of preflight's tasks, and the faults found."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .pairs import Floors, Measured

EXCLUDE_AND_REPAIR = "exclude it and have it repaired"
"""The fix of a fault that only the site's support can repair."""


@dataclass(frozen=True)
class Expected:
    """Requirements of the job on its nodes."""

    nodes: list[str]
    tasks: int
    gpus: int
    local_disk: str = "/tmp"
    min_free_gib: float = 0.0
    max_clock_skew_s: float = 1.0
    floors: Floors = field(default_factory=Floors)
    all_reduce: bool = True


@dataclass
class Judgement:
    """Faults by node, faults of no single node, and notes that stop no job."""

    bad: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Each text is `what. Fix: how`."""
    no_single_node: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def any_fault(self) -> bool:
        return bool(self.bad or self.no_single_node)

    @property
    def exit_code(self) -> int:
        return 2 if self.bad else 3 if self.no_single_node else 0


class Reports:
    """The tasks' reports, by kind."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._all: list[dict[str, Any]] = []
        self.others: list[str] = []
        """Lines that are no reports, such as srun's messages."""
        for line in lines:
            try:
                self._all.append(json.loads(line))
                assert "preflight" in self._all[-1]
            except (ValueError, AssertionError, TypeError):
                self.others.append(line)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return all reports of a kind."""
        return [each for each in self._all if each["preflight"] == kind]

    def by_node(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the reports of a kind that hold no error, by node."""
        return {each["host"]: each for each in self.of(kind) if "error" not in each}

    def pairs(self) -> list[Measured]:
        """Return the all-reduces that were measured between two nodes."""
        return [
            Measured((each["nodes"][0], each["nodes"][1]), each["mb_s"], each["latency_us"]) for each in self.of("pair")
        ]

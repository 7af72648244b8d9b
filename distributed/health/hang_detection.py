"""Which rank is stuck: pure functions over what each rank last said of itself."""

from collections.abc import Mapping
from dataclasses import dataclass

PHASES = ("start", "input", "first step", "step", "evaluation", "checkpoint", "close")
"""What a rank does, in the order of a step."""

# Phases that rightly take long without a sign of progress, and how many times the limit they may: reading data sets, weights
# and the first clips, choosing kernels, a slow file system, rank 0's report at the end.
_PATIENCE = {"start": 4.0, "first step": 4.0, "checkpoint": 4.0, "close": 4.0}


@dataclass(frozen=True)
class Place:
    """Where a rank is; `marks` counts its signs of progress."""

    step: int = 0
    phase: str = "start"
    marks: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return (self.step, PHASES.index(self.phase))

    def __str__(self) -> str:
        return f"step {self.step}, phase {self.phase}"


@dataclass(frozen=True)
class Seen:
    """A rank as rank 0 sees it: times are of rank 0's clock."""

    place: Place
    marked_s: float
    """When it last made progress."""
    heard_s: float
    """When it last said anything."""


def patience_s(phase: str, limit_s: float) -> float:
    """How long a job may stand still while its last ranks are in this phase."""
    return limit_s * _PATIENCE.get(phase, 1.0)


def stuck_ranks(seen: Mapping[int, Seen], now_s: float, limit_s: float, silent_s: float) -> list[int]:
    """The ranks that hold a job up, or none while it moves.

    Ranks that wait in a collective look stuck too, so a job stands still only when no rank at all has made progress within
    the patience for the phase of those furthest behind. Named are then the ranks that say nothing (stopped processes, lost
    nodes), and where all speak, those furthest behind; that may be all of them.
    """
    behind = min(state.place.order for state in seen.values())
    last = [rank for rank, state in seen.items() if state.place.order == behind]
    silent = [rank for rank, state in seen.items() if now_s - state.heard_s > silent_s]
    limit_s = max(patience_s(seen[rank].place.phase, limit_s) for rank in silent or last)
    if now_s - max(state.marked_s for state in seen.values()) <= limit_s:
        return []
    return sorted(silent or last)

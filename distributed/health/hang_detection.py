"""Find the ranks that hang: pure functions of the place and the last heartbeat of every rank."""

from collections.abc import Mapping
from dataclasses import dataclass

PHASES = ("start", "input", "first step", "step", "evaluation", "checkpoint", "close")
"""The phases of a rank, in the order of a step."""

# Phases that may take long without progress, and the factor on the hang timeout: reading data sets, weights and the first
# clips, choosing kernels, a slow file system, rank 0's report at the end.
_TIMEOUT_FACTORS = {"start": 4.0, "first step": 4.0, "checkpoint": 4.0, "close": 4.0}

_STORAGE_FACTOR = 4.0
"""Further factor while the kernel says that a rank waits for storage: disks and file servers recover after minutes."""

_LEAST_PAUSE_S = 2.0


@dataclass(frozen=True)
class Place:
    """The place of a rank in its work. `progress_count` increases with each call of `ControlChannel.progress`."""

    step: int = 0
    phase: str = "start"
    progress_count: int = 0

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"unknown phase {self.phase!r}. Fix: one of hang_detection.PHASES")

    @property
    def order(self) -> tuple[int, int]:
        return (self.step, PHASES.index(self.phase))

    def __str__(self) -> str:
        return f"step {self.step}, phase {self.phase}"


@dataclass(frozen=True)
class RankState:
    """A rank as the monitor sees it; times are of the monitor's clock."""

    place: Place
    progress_s: float
    """Time of the last progress."""
    heartbeat_s: float
    """Time of the last heartbeat."""


def heartbeat_interval_s(world_size: int) -> float:
    """Return the time between two heartbeats of a rank: rank 0's node receives at most about 500 messages/s."""
    return max(0.5, world_size / 500)


def heartbeat_timeout_s(world_size: int) -> float:
    """Return the time without a heartbeat, on a busy node, after which a rank counts as silent."""
    return 5.0 + 4 * heartbeat_interval_s(world_size)


def own_pause_s(took_s: float, expected_s: float) -> float:
    """Return for how long this process was stopped in a wait that should take `expected_s`; 0 for a delay by a busy machine.

    A suspended job or a paused virtual machine is no hang: times of heartbeats and progress move on by the pause.
    """
    pause_s = took_s - expected_s
    return pause_s if pause_s > _LEAST_PAUSE_S else 0.0


def phase_timeout_s(phase: str, hang_timeout_s: float) -> float:
    """Return the time that a job may spend without progress while its last ranks are in this phase."""
    return hang_timeout_s * _TIMEOUT_FACTORS.get(phase, 1.0)


def storage_timeout_s(phase: str, hang_timeout_s: float) -> float:
    """Return the same while one of its last ranks waits for a disk or file server."""
    return _STORAGE_FACTOR * phase_timeout_s(phase, hang_timeout_s)


def stuck_ranks(
    states: Mapping[int, RankState], now_s: float, hang_timeout_s: float, silent_after_s: float
) -> list[int]:
    """Return the ranks that a hung job waits for, or an empty list while the job makes progress.

    Ranks that wait in a collective make no progress either, so a job hangs only when no rank at all has made progress within
    the timeout of the phase of the ranks with the least progress. The result is then the silent ranks (stopped processes, lost
    nodes), or, where all ranks send heartbeats, those with the least progress, which may be all of them.
    """
    furthest_behind = min(state.place.order for state in states.values())
    last = [rank for rank, state in states.items() if state.place.order == furthest_behind]
    silent = [rank for rank, state in states.items() if now_s - state.heartbeat_s > silent_after_s]
    limit_s = max(phase_timeout_s(states[rank].place.phase, hang_timeout_s) for rank in silent or last)
    if now_s - max(state.progress_s for state in states.values()) <= limit_s:
        return []
    return sorted(silent or last)

"""Find stragglers: ranks whose own part of a step takes longer than that of the median rank.

A rank's own time runs from waiting for its clips to its last gradient, without the time in which it waits for other ranks. On
CPUs it also excludes the time in which the rank was ready to run but other programs had the cores. Ranks often share a node
with other programs there, whose bursts would make any rank look like a straggler.

Shapes: R ranks, W windows.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

# Fewer steps are too noisy on a busy node.
WINDOW_STEPS = 20
# A straggler's own time exceeds the median rank's by EXCESS in the mean of WINDOWS windows in a row, and by MIN_EXCESS in each.
# Smaller differences are the noise of a healthy job.
WINDOWS = 2
EXCESS = 0.3
MIN_EXCESS = 0.1


@dataclass(frozen=True)
class Straggler:
    """A rank that slows all ranks down, as measured in the newest window."""

    rank: int
    busy_s: float
    """Its own time per step."""
    median_busy_s: float
    """The median rank's own time per step."""


class Stragglers:
    """Finds stragglers in the own times of all ranks."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._records: deque[tuple[Tensor, int]] = deque()
        self._named_R = torch.zeros(size, dtype=torch.bool)

    def add(self, own_R: Tensor, steps: int) -> list[Straggler]:
        """Take each rank's own seconds in the next `steps` steps. Returns the new stragglers.

        The windows end with these steps and do not overlap. A rank is not returned again until it has recovered.
        """
        self._records.append((own_R, steps))
        windows = self._windows()
        if self._size < 2 or windows is None:
            return []
        exceeds_WR = torch.stack([_excess(own_R) > MIN_EXCESS for own_R in windows])
        slow_R = exceeds_WR.all(0) & (_excess(torch.stack(windows).mean(0)) > EXCESS)
        new_R = slow_R & ~self._named_R
        self._named_R = slow_R | (self._named_R & exceeds_WR[0])
        newest_R = windows[0]
        median_s = newest_R.median().item()
        return [Straggler(rank, newest_R[rank].item(), median_s) for rank in new_R.nonzero().flatten().tolist()]

    def _windows(self) -> list[Tensor] | None:
        """Return own seconds per step of each rank in the last windows, newest first, and drop older records."""
        windows, own_R, steps = [], torch.zeros(self._size, dtype=torch.float64), 0
        for used, (more_R, more) in enumerate(reversed(self._records), start=1):
            own_R, steps = own_R + more_R, steps + more
            if steps >= WINDOW_STEPS:
                windows.append(own_R / steps)
                own_R, steps = torch.zeros_like(own_R), 0
            if len(windows) == WINDOWS:
                while len(self._records) > used:
                    self._records.popleft()
                return windows
        return None


def _excess(own_R: Tensor) -> Tensor:
    """Return the relative excess over the lower median (as `torch.median`)."""
    return own_R / own_R.median() - 1

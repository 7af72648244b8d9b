"""Find stragglers: ranks whose own part of a step takes longer than that of the median rank.

A rank's own time runs from waiting for its clips to its last gradient, without the time in which it waits for other ranks. On
CPUs it also excludes the time in which the rank was ready to run but other programs had the cores. Ranks often share a node
with other programs there, whose bursts would make any rank look like a straggler.

Shapes: R ranks, W windows.
"""

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distributed.backends.base import Backend

# Fewer steps are too noisy on a busy node.
WINDOW_STEPS = 20
# A straggler's own time exceeds the median rank's by EXCESS in the mean of WINDOWS windows in a row, and by MIN_EXCESS in each.
# Smaller differences are the noise of a healthy job.
WINDOWS = 2
EXCESS = 0.3
MIN_EXCESS = 0.1

_SCHEDSTAT = Path("/proc/thread-self/schedstat")
_Moment = float | torch.cuda.Event


@dataclass(frozen=True)
class StepTimes:
    """One rank's times, in seconds, summed over some steps."""

    own_s: float
    """Waiting for clips, forward and backward."""
    messages_s: float
    """In messages of batch norm over ranks; not part of `own_s`."""
    steps: int


class OwnTimeClock:
    """Measures one rank's own time, summed over steps. For use in one thread.

    On GPUs the waits of batch norm over ranks count as own time, because the device waits, unseen by the host. The published
    recipe's batch norm is local and has no such wait.
    """

    def __init__(self, network: nn.Module, backend: Backend) -> None:
        self._backend = backend
        # On GPUs the device's time counts. Not every kernel has the file.
        self._reads_run_queue = backend.device.type == "cpu" and _SCHEDSTAT.exists()
        self._spans: list[tuple[_Moment, _Moment]] = []
        self._input_s = self._messages_s = self._queued_s = 0.0
        self._input_began_s = 0.0
        self._began: _Moment = 0.0
        self._ready: _Moment = 0.0
        self._ready_waited_s = self._ready_queued_s = 0.0
        # The first layer's gradient comes last. After it the rank waits for the reduction.
        first = next(parameter for parameter in network.parameters() if parameter.requires_grad)
        first.register_post_accumulate_grad_hook(self._note_ready)

    def begin_input(self) -> None:
        """Call this before waiting for a step's clips."""
        self._queued_s -= self._run_queue_s()
        self._input_began_s = time.perf_counter()

    def begin_step(self) -> None:
        """Call this when the clips are there."""
        self._input_s += time.perf_counter() - self._input_began_s
        self._messages_s -= self._backend.waited_s
        self._began = self._now()

    def _note_ready(self, _: Tensor) -> None:
        self._ready, self._ready_waited_s = self._now(), self._backend.waited_s
        self._ready_queued_s = self._run_queue_s()

    def end_step(self) -> None:
        """Call this after the step's last backward pass."""
        self._spans.append((self._began, self._ready))
        self._messages_s += self._ready_waited_s
        self._queued_s += self._ready_queued_s

    def read(self) -> StepTimes:
        """Return the times since the last call. Waits for the device."""
        spent_s = self._input_s + sum(_seconds(*span) for span in self._spans)
        # A rank that waits for a message then also waits for a core, and both clocks count that time. So subtract one only.
        queued_s = self._queued_s if self._messages_s == 0 else 0.0
        times = StepTimes(spent_s - self._messages_s - queued_s, self._messages_s, len(self._spans))
        self._spans.clear()
        self._input_s = self._messages_s = self._queued_s = 0.0
        return times

    def _run_queue_s(self) -> float:
        """Return how long this thread has been ready to run without a core, by Linux's count (its sched-stats.rst).

        A process that is stopped, or waits for a disk, is not ready to run.
        """
        if not self._reads_run_queue:
            return 0.0
        _, waited_ns, _ = _SCHEDSTAT.read_bytes().split()
        return int(waited_ns) / 1e9

    def _now(self) -> _Moment:
        if self._backend.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event


def _seconds(began: _Moment, ready: _Moment) -> float:
    if isinstance(began, float) and isinstance(ready, float):
        return ready - began
    assert isinstance(began, torch.cuda.Event) and isinstance(ready, torch.cuda.Event)
    ready.synchronize()
    return began.elapsed_time(ready) / 1000  # type: ignore[no-any-return, no-untyped-call]


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

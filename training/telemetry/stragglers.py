"""Which rank holds the others up: in a step that ends for all together, all are as slow as the slowest.

Measured is how long each rank was busy with its own part of a step, from waiting for its clips to its last gradient, without the
time that it waited for others; and, on CPUs, how much of it went by while it was ready and other programs had the cores.

Shapes: R ranks, W windows.
"""

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distributed.backends.base import Backend

WINDOW_STEPS = 20  # fewer say little on a busy node
# In parts of the median rank's time, over windows in a row: less is the noise of a healthy job.
EXCESS = 0.3  # of all of them together
LEAST_EXCESS = 0.1  # of each: a single bad moment is no fault
SLOW_WINDOWS = 2  # of what a rank takes by itself
CROWDED_WINDOWS = 5  # with its wait for a core, which another program's burst of seconds brings about

_SCHEDSTAT = Path("/proc/thread-self/schedstat")
_Moment = float | torch.cuda.Event


@dataclass(frozen=True)
class Busy:
    """One rank's time in some steps, in seconds."""

    own_s: float
    """For its clips, forward and backward; without the two below."""
    queued_s: float
    """Ready to run, without a core; 0 where there are messages."""
    messages_s: float
    """In messages of batch norm over ranks."""
    steps: int


class BusyClock:
    """One rank's own time, summed over steps; reading it waits for the device. For use in one thread.

    Waiting for other ranks inside a step (batch norm over ranks) is left out on CPUs. On GPUs the device waits there, unseen by
    the host, and it is counted; the published recipe's batch norm is local, and has no such wait.
    """

    def __init__(self, network: nn.Module, backend: Backend) -> None:
        self._backend = backend
        # On GPUs the device's time counts; and not every kernel keeps the count.
        self._counts_queue = backend.device.type == "cpu" and _SCHEDSTAT.exists()
        self._spans: list[tuple[_Moment, _Moment]] = []
        self._input_s = self._messages_s = self._queued_s = 0.0
        self._asked_s = 0.0
        self._began: _Moment = 0.0
        self._ready: _Moment = 0.0
        self._ready_waited_s = self._ready_queued_s = 0.0
        # The first layer's gradient is the last; what comes behind it is the wait for the reduction.
        first = next(parameter for parameter in network.parameters() if parameter.requires_grad)
        first.register_post_accumulate_grad_hook(self._note_ready)

    def ask(self) -> None:
        """A step's clips are asked for."""
        self._queued_s -= self._queue_s()
        self._asked_s = time.perf_counter()

    def start(self) -> None:
        """They are there: the step begins."""
        self._input_s += time.perf_counter() - self._asked_s
        self._messages_s -= self._backend.waited_s
        self._began = self._now()

    def _note_ready(self, _: Tensor) -> None:
        self._ready, self._ready_waited_s = self._now(), self._backend.waited_s
        self._ready_queued_s = self._queue_s()

    def stop(self) -> None:
        """The step's last backward pass is done."""
        self._spans.append((self._began, self._ready))
        self._messages_s += self._ready_waited_s
        self._queued_s += self._ready_queued_s

    def _queue_s(self) -> float:
        return _core_queue_s() if self._counts_queue else 0.0

    def _now(self) -> _Moment:
        if self._backend.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event

    def read(self) -> Busy:
        """What has come together since the last time."""
        spent_s = self._input_s + sum(_seconds(*span) for span in self._spans)
        # Who waits for a message also waits for a core when it has come, and that is counted in both.
        queued_s = self._queued_s if self._messages_s == 0 else 0.0
        busy = Busy(spent_s - self._messages_s - queued_s, queued_s, self._messages_s, len(self._spans))
        self._spans.clear()
        self._input_s = self._messages_s = self._queued_s = 0.0
        return busy


def _core_queue_s() -> float:
    """How long this thread has been ready to run while others had the cores, so far, by Linux' own count (sched-stats.rst in its
    documentation). A process that is stopped, or waits for a disk, is not ready."""
    _, waited_ns, _ = _SCHEDSTAT.read_bytes().split()
    return int(waited_ns) / 1e9


def _seconds(began: _Moment, ready: _Moment) -> float:
    if isinstance(began, float) and isinstance(ready, float):
        return ready - began
    assert isinstance(began, torch.cuda.Event) and isinstance(ready, torch.cuda.Event)
    ready.synchronize()
    return began.elapsed_time(ready) / 1000  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Straggler:
    """Who holds the others up, by the newest window."""

    rank: int
    busy_s: float
    """A step, with the wait for a core where that is what makes it one."""
    median_busy_s: float
    """The median rank's."""
    queued: bool
    """Only with its wait for a core does it stand out: other programs have the cores of its node."""


class Stragglers:
    """Takes in how busy all ranks were, and names those that stand out for a while."""

    def __init__(self, size: int) -> None:
        self._slow = _Standouts(size, SLOW_WINDOWS)
        self._crowded = _Standouts(size, CROWDED_WINDOWS)

    def add(self, own_R: Tensor, queued_R: Tensor, steps: int) -> list[Straggler]:
        """Each rank's own seconds and its seconds without a core in so many further steps. Returns those that are newly named."""
        slow = self._slow.add(own_R, steps)
        crowded = [named for named in self._crowded.add(own_R + queued_R, steps) if not self._slow.names(named[0])]
        return [Straggler(*named, queued=False) for named in slow] + [
            Straggler(*named, queued=True) for named in crowded
        ]


class _Standouts:
    """Ranks that are EXCESS over the median rank in several windows in a row together, and LEAST_EXCESS in each."""

    def __init__(self, size: int, windows: int) -> None:
        self._size = size
        self._count = windows
        self._records: deque[tuple[Tensor, int]] = deque()
        self._named_R = torch.zeros(size, dtype=torch.bool)

    def add(self, busy_R: Tensor, steps: int) -> list[tuple[int, float, float]]:
        """Seconds of each rank in so many further steps. Returns (rank, seconds a step, median rank's) of those newly named.

        The windows end with this record and do not overlap. A rank is not named again until it no longer stands out.
        """
        self._records.append((busy_R, steps))
        windows = self._windows()
        if self._size < 2 or windows is None:
            return []
        out_WR = torch.stack([_excess(busy_R) > LEAST_EXCESS for busy_R in windows])
        out_R = out_WR.all(0) & (_excess(torch.stack(windows).mean(0)) > EXCESS)
        new_R = out_R & ~self._named_R
        self._named_R = out_R | (self._named_R & out_WR[0])
        newest_R = windows[0]
        return [(rank, newest_R[rank].item(), newest_R.median().item()) for rank in new_R.nonzero().flatten().tolist()]

    def names(self, rank: int) -> bool:
        """Has this rank been named, and not recovered since?"""
        return bool(self._named_R[rank])

    def _windows(self) -> list[Tensor] | None:
        """Seconds a step by rank in the last windows, newest first; older records are dropped."""
        windows, busy_R, steps = [], torch.zeros(self._size, dtype=torch.float64), 0
        for used, (more_R, more) in enumerate(reversed(self._records), start=1):
            busy_R, steps = busy_R + more_R, steps + more
            if steps >= WINDOW_STEPS:
                windows.append(busy_R / steps)
                busy_R, steps = torch.zeros_like(busy_R), 0
            if len(windows) == self._count:
                while len(self._records) > used:
                    self._records.popleft()
                return windows
        return None


def _excess(busy_R: Tensor) -> Tensor:
    """Over the median rank: of two ranks the faster is the measure; of more, the middle one, or the lower of two in the middle."""
    return busy_R / busy_R.median() - 1

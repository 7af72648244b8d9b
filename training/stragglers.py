"""Which rank holds the others up: in a step that ends for all together, all are as slow as the slowest.

Measured is how long each rank was busy with its own part of a step, from waiting for its clips to its last gradient, without the
time that it waited for others.

Shapes: R ranks.
"""

import time
from collections import deque

import torch
from torch import Tensor, nn

from distributed.backend import Backend

WINDOW_STEPS = 20  # fewer say little on a busy node
EXCESS = 0.2  # in parts of the median rank's busy time: less is the noise of a healthy job
WINDOWS = 2  # in a row

_Moment = float | torch.cuda.Event


class BusyClock:
    """One rank's own time, summed over steps; reading it waits for the device.

    Waiting for other ranks inside a step (batch norm over ranks) is left out on CPUs. On GPUs the device waits there, unseen by
    the host, and it is counted; the published recipe's batch norm is local, and has no such wait.
    """

    def __init__(self, network: nn.Module, backend: Backend) -> None:
        self._backend = backend
        self._spans: list[tuple[_Moment, _Moment]] = []
        self._input_s = self._messages_s = 0.0
        self._began: _Moment = 0.0
        self._waited_s = 0.0
        self._ready: _Moment = 0.0
        # The first layer's gradient is the last; what comes behind it is the wait for the reduction.
        first = next(parameter for parameter in network.parameters() if parameter.requires_grad)
        first.register_post_accumulate_grad_hook(self._note_ready)

    def start(self, input_s: float) -> None:
        """A step begins; its clips were waited for so long."""
        self._input_s += input_s
        self._messages_s -= self._backend.waited_s
        self._began = self._now()

    def _note_ready(self, _: Tensor) -> None:
        self._ready, self._waited_s = self._now(), self._backend.waited_s

    def stop(self) -> None:
        """The step's last backward pass is done."""
        self._spans.append((self._began, self._ready))
        self._messages_s += self._waited_s

    def _now(self) -> _Moment:
        if self._backend.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> tuple[float, float, int]:
        """Seconds since the last time: busy, and in messages of batch norm over ranks; and in how many steps."""
        messages_s, steps = self._messages_s, len(self._spans)
        busy_s = self._input_s + sum(_seconds(*span) for span in self._spans) - messages_s
        self._spans.clear()
        self._input_s = self._messages_s = 0.0
        return busy_s, messages_s, steps


def _seconds(began: _Moment, ready: _Moment) -> float:
    if isinstance(began, float) and isinstance(ready, float):
        return ready - began
    assert isinstance(began, torch.cuda.Event) and isinstance(ready, torch.cuda.Event)
    ready.synchronize()
    return began.elapsed_time(ready) / 1000  # type: ignore[no-any-return, no-untyped-call]


class Stragglers:
    """Takes in how busy all ranks were, and names those that stand out for a while."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._records: deque[tuple[Tensor, int]] = deque()
        self._named_R = torch.zeros(size, dtype=torch.bool)

    def add(self, busy_R: Tensor, steps: int) -> list[tuple[int, float, float]]:
        """Busy seconds of each rank in so many further steps. Returns (rank, seconds a step, median rank's) of those newly named.

        A rank stands out in a window with EXCESS over the median. It is named when it does so in each of the last WINDOWS windows,
        which end with this record and do not overlap, and not again until it no longer does.
        """
        self._records.append((busy_R, steps))
        windows = self._windows()
        if self._size < 2 or windows is None:
            return []
        # Of two ranks the faster is the measure; of more, the middle one, or the lower of two in the middle.
        out_WR = torch.stack([busy_R > (1 + EXCESS) * busy_R.median() for busy_R in windows])
        out_R = out_WR.all(0)
        new_R = out_R & ~self._named_R
        self._named_R = out_R | (self._named_R & out_WR[0])
        newest_R = windows[0]
        return [(rank, newest_R[rank].item(), newest_R.median().item()) for rank in new_R.nonzero().flatten().tolist()]

    def _windows(self) -> list[Tensor] | None:
        """Busy seconds a step by rank in the last windows, newest first; older records are dropped."""
        windows, busy_R, steps = [], torch.zeros(self._size, dtype=torch.float64), 0
        for used, (more_R, more) in enumerate(reversed(self._records), start=1):
            busy_R, steps = busy_R + more_R, steps + more
            if steps >= WINDOW_STEPS:
                windows.append(busy_R / steps)
                busy_R, steps = torch.zeros_like(busy_R), 0
            if len(windows) == WINDOWS:
                while len(self._records) > used:
                    self._records.popleft()
                return windows
        return None

"""Measure the phases of a rank's steps: with CUDA events on GPUs, which the host never waits for, else with the host's clock."""

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from distributed.backends.base import Backend

PHASES = ("between_steps", "forward", "backward", "reduction_wait", "optimizer")
"""The phases of a step, in order. Together they are the whole time.

between_steps: waiting for clips, and the training loop's own work. reduction_wait: from this rank's last gradient until the
gradients of all ranks are reduced. optimizer: also unscaling, clipping, the non-finite guard and the EMA.
"""

_NONE = ""
"""Time that belongs to no phase: evaluations, checkpoints, writing records."""

_SCHEDSTAT = Path("/proc/thread-self/schedstat")
_Moment = float | torch.cuda.Event


@dataclass(frozen=True)
class StepTimes:
    """One rank's times, in seconds, summed over some steps."""

    steps: int
    own_s: float
    """Waiting for clips, forward and backward, without waiting for other ranks."""
    messages_s: float
    """In messages of batch norm over ranks; not part of `own_s`, and on CPUs part of the phases forward and backward."""
    phases_s: dict[str, float]
    """By name, of PHASES."""


class StepClock:
    """Measures one rank's phases and its own time, summed over steps. For use in one thread.

    On CPUs the own time also excludes the time in which the rank was ready to run but other programs had the cores. On GPUs the
    waits of batch norm over ranks count as own time, because the device waits, unseen by the host. The published recipe's batch
    norm is local and has no such wait.
    """

    def __init__(self, network: nn.Module, backend: Backend) -> None:
        self._backend = backend
        # On GPUs the device's time counts. Not every kernel has the file.
        self._reads_run_queue = backend.device.type == "cpu" and _SCHEDSTAT.exists()
        self._marks: list[tuple[str, _Moment]] = []
        self._steps = 0
        self._input_s = self._messages_s = self._queued_s = 0.0
        self._input_began_s = 0.0
        self._ready_waited_s = self._ready_queued_s = 0.0
        # The first layer's gradient comes last. After it the rank waits for the reduction.
        first = next(parameter for parameter in network.parameters() if parameter.requires_grad)
        first.register_post_accumulate_grad_hook(self._note_ready)
        self.restart()

    def restart(self) -> None:
        """Begin the time between two steps now. The time since the last step belongs to no phase."""
        if self._marks:
            _, ended = self._marks[-1]
            self._marks[-1] = (_NONE, ended)
        self.mark("between_steps")

    def mark(self, phase: str) -> None:
        """Begin a phase, of PHASES. The one before ends."""
        self._marks.append((phase, self._now()))

    def begin_input(self) -> None:
        """Call this before waiting for a step's clips."""
        self._queued_s -= self._run_queue_s()
        self._input_began_s = time.perf_counter()

    def begin_step(self) -> None:
        """Call this when the clips are there."""
        self._input_s += time.perf_counter() - self._input_began_s
        self._messages_s -= self._backend.waited_s
        self.mark("forward")

    def _note_ready(self, _: Tensor) -> None:
        self.mark("reduction_wait")
        self._ready_waited_s, self._ready_queued_s = self._backend.waited_s, self._run_queue_s()

    def end_step(self) -> None:
        """Call this after the optimizer's step."""
        self.mark("between_steps")
        self._messages_s += self._ready_waited_s
        self._queued_s += self._ready_queued_s
        self._steps += 1

    def read(self) -> StepTimes:
        """Return the times since the last call. Waits for the device."""
        # The time since the last step.
        self.mark("between_steps")
        phases_s = dict.fromkeys(PHASES, 0.0)
        for (phase, began), (_, ended) in pairwise(self._marks):
            if phase != _NONE:
                phases_s[phase] += _seconds(began, ended)
        spent_s = self._input_s + phases_s["forward"] + phases_s["backward"]
        # A rank that waits for a message then also waits for a core, and both clocks count that time. So subtract one only.
        queued_s = self._queued_s if self._messages_s == 0 else 0.0
        times = StepTimes(self._steps, spent_s - self._messages_s - queued_s, self._messages_s, phases_s)
        del self._marks[:-1]
        self._steps = 0
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


def _seconds(began: _Moment, ended: _Moment) -> float:
    if isinstance(began, float) and isinstance(ended, float):
        return ended - began
    assert isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event)
    ended.synchronize()
    return began.elapsed_time(ended) / 1000  # type: ignore[no-any-return, no-untyped-call]

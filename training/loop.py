"""The training loop: take steps to the recipe's end, and log, evaluate and save on the way."""

import time
from collections import deque

import torch

from runtime.exit_codes import EXIT_DONE
from runtime.stop_signals import EXIT_CODES
from training.evaluation.evaluate import EvaluationStopped
from training.evaluation.validate import validate
from training.optim.gradient_diagnostics import GradientDiagnostics
from training.telemetry.interval import LogInterval
from training.telemetry.metrics_log import MetricsLog
from training.telemetry.step_profile import StepProfiler

from .checkpointing import Checkpointer
from .job import Job
from .last_checkpoint import check_finished
from .signals import StopSignal

STEPS_IN_FLIGHT = 2
"""Steps that the host may run ahead of its GPU. It bounds how far ahead ranks agree on a step to stop at."""


def train(job: Job, log: MetricsLog) -> int:
    """Train to the recipe's end, or to a stop that all ranks agree on. Returns the exit code."""
    loop = _Loop(job, log)
    with loop.signal, loop.checkpointer:
        if loop.evaluation_owed:
            loop.make_owed_evaluation()
        while loop.stop_reason is None and loop.taken < loop.last_step:
            loop.take_step()
        return loop.finish()


class _Loop:
    """One start of a run: how far it is, why it stops, and the parts that work on each step."""

    def __init__(self, job: Job, log: MetricsLog) -> None:
        recipe, settings = job.recipe, job.config.logger
        self.job, self.log = job, log
        self.taken = job.first_step
        """Steps taken, those of earlier starts included."""
        self.last_step = min(recipe.total_steps, job.config.max_steps or recipe.total_steps)
        self.stop_reason: str | None = None
        """Name of the signal that all ranks stop for."""
        self.evaluation_owed = job.evaluation_owed
        """The evaluation after `taken` steps is due, and has not been made."""
        self._epoch_ends = {recipe.epoch_end_step(epoch): epoch for epoch in range(1, int(recipe.epochs) + 2)}
        self._log_every = settings.every_steps
        positions = job.execution.stream_positions(job.backend.topology.rank, job.first_step, self.last_step)
        self._batches = job.loader(job.training_clips).batches(positions)
        self._evaluations = self._evaluation_steps()
        self._interval = LogInterval(job, self.last_step, self._evaluations)
        self._diagnostics: GradientDiagnostics | None = None
        if settings.diagnostics:
            trainer = job.trainer
            self._diagnostics = GradientDiagnostics(trainer.network, trainer.optimizer, job.backend, job.execution)
        self._profiler: StepProfiler | None = None
        if settings.profile_steps and job.backend.topology.rank == 0:
            first, last = settings.profile_steps
            self._profiler = StepProfiler(first, last, job.folder.profile, job.backend.device)
        self._in_flight = _StepsInFlight(job.backend.device)
        self.signal = StopSignal()
        self.checkpointer = Checkpointer(job, log)

    def _evaluation_steps(self) -> set[int]:
        """Return the numbers of steps after which an evaluation is due."""
        every = self.job.config.evaluation.every_epochs
        by_epoch = {end for end, epoch in self._epoch_ends.items() if epoch % every == 0}
        return by_epoch | {self.job.recipe.total_steps}

    @property
    def _ends_here(self) -> bool:
        return self.stop_reason is not None or self.taken == self.last_step

    def make_owed_evaluation(self) -> None:
        """Make the evaluation that the previous start did not finish, and save: its checkpoint says that it is owed."""
        is_best = self._evaluate()
        if not self.evaluation_owed:
            self.checkpointer.save(self.taken, is_best)
        self._interval.restart()

    def take_step(self) -> None:
        """Take the next step, then log, evaluate and save where that is due."""
        job, step, interval = self.job, self.taken, self._interval
        is_first = step == job.first_step
        if self._profiler is not None and (line := self._profiler.step(step)):
            self.log.info(line)
        # Loader workers start with the first clips.
        job.control.progress(step, "start" if is_first else "input")
        accumulation = job.execution.accumulation
        micro_batches = interval.timed_input(step, lambda: [next(self._batches) for _ in range(accumulation)])
        job.control.progress(step, "first step" if is_first else "step")
        self.taken = step + 1
        log_due = self.taken % self._log_every == 0
        diagnostics = self._diagnostics if log_due else None
        with interval.timed_step() as mark:
            totals = job.trainer.step(step, micro_batches, diagnostics, mark)
        interval.add(step, micro_batches, totals)
        self._in_flight.wait()
        if is_first:
            interval.record_first_step(self.taken, self.log)
        self.stop_reason = job.control.agreed_stop(step, self._in_flight.limit, self.signal.received)
        self.checkpointer.report()
        save_due_by_clock = False
        if log_due or self._ends_here:
            save_due_by_clock = interval.record(self.taken, self.log, self.checkpointer.due_by_clock())
        if diagnostics is not None and (values := diagnostics.values()):
            self.log.write("diagnostics", self.taken, **values)
        self._evaluate_and_save(save_due_by_clock)

    def _evaluate_and_save(self, save_due_by_clock: bool) -> None:
        job, step, is_best = self.job, self.taken - 1, False
        epoch = self._epoch_ends.get(self.taken)
        self.evaluation_owed = self.taken in self._evaluations
        if self.evaluation_owed and self.stop_reason is None:
            job.control.progress(step, "evaluation")
            self._interval.settle(self.log)
            began_s = time.monotonic()
            is_best = self._evaluate()
            self._interval.evaluated(time.monotonic() - began_s)
        if self._ends_here or save_due_by_clock or is_best or self.checkpointer.due(self.taken, epoch):
            job.control.progress(step, "checkpoint")
            self._interval.settle(self.log)
            self.checkpointer.save(self.taken, is_best, evaluation_owed=self.evaluation_owed)
            self._interval.restart()

    def _evaluate(self) -> bool:
        """Evaluate after `taken` steps, unless a stop cuts it off. Returns True if the checkpoint is to be kept as the best."""
        control = self.job.control
        try:
            is_best = validate(self.job, self.log, self.taken, lambda: control.stop_wanted(self.signal.received))
        except EvaluationStopped:
            self.stop_reason = control.stop_reason()
            return False
        self.evaluation_owed = False
        return is_best and self.job.config.checkpoint.keep_best

    def finish(self) -> int:
        """Wait for the last checkpoint, and log why the loop ended. Returns the exit code."""
        self._interval.close(self.taken, self.log)
        if self._profiler is not None and (line := self._profiler.close()):
            self.log.info(line)
        control = self.job.control
        last = self.checkpointer.finish(
            self.taken - 1, self.stop_reason is not None, lambda: control.stop_wanted(self.signal.received)
        )
        if self.stop_reason is None:
            check_finished(last, self.taken, self.job.folder.checkpoints)
            return EXIT_DONE
        saved = "with a checkpoint" if last.failed is None else f"with none after step {self.checkpointer.newest_step}"
        owed = ", evaluation still owed" if self.evaluation_owed else ""
        self.log.info(
            f"stopped by {self.stop_reason} after step {self.taken}, {saved}{owed}: the same command with "
            f"run_id={self.job.config.run_id} resumes it"
        )
        return EXIT_CODES[self.stop_reason]


class _StepsInFlight:
    """Keeps the host at most STEPS_IN_FLIGHT steps ahead of its GPU. On a CPU a step is done when the call returns."""

    def __init__(self, device: torch.device) -> None:
        self._events: deque[torch.cuda.Event] | None = deque() if device.type == "cuda" else None
        self.limit = STEPS_IN_FLIGHT if device.type == "cuda" else 0

    def wait(self) -> None:
        if self._events is None:
            return
        # Blocking: decoders use the core meanwhile.
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._events.append(event)
        if len(self._events) > STEPS_IN_FLIGHT:
            self._events.popleft().synchronize()

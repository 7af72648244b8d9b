"""The training loop: steps until the recipe's end, with records, evaluations and checkpoints on the way."""

from collections import deque

import torch

from runtime.exit_codes import EXIT_DONE
from training.evaluation.evaluate import EvaluationStopped
from training.evaluation.validate import validate
from training.optim.gradient_diagnostics import GradientDiagnostics
from training.telemetry.interval import LogInterval
from training.telemetry.metrics_log import MetricsLog

from .checkpointing import Checkpointer, check_finished
from .job import Job
from .signals import StopSignal

STEPS_IN_FLIGHT = 2  # how far a host runs ahead of its GPU; bounds when ranks can agree to stop


def train(job: Job, records: MetricsLog) -> int:
    """Train to the recipe's end, or to a stop that all ranks agree on; the exit code."""
    config, recipe, control = job.config, job.recipe, job.control
    epoch_ends = {recipe.epoch_end_step(epoch): epoch for epoch in range(1, int(recipe.epochs) + 2)}
    last_step = min(recipe.total_steps, config.max_steps or recipe.total_steps)
    plan = job.execution.stream_positions(job.backend.topology.rank, job.first_step, last_step)
    batches = job.loader(job.training_clips).batches(plan)
    window = LogInterval(job)
    diagnostics = _diagnostics(job) if config.logger.diagnostics else None
    in_flight = _StepsInFlight(job.backend.device)
    with StopSignal() as signal, Checkpointer(job, records) as checkpointer:

        def evaluate(step: int) -> tuple[bool, str | None]:
            """Whether the checkpoint behind it is to be kept as the best so far; and why the job stops, where that cut it off."""
            try:
                best = validate(job, records, step, lambda: control.stop_wanted(signal.received))
            except EvaluationStopped:
                return False, control.stop_reason(signal.received)
            return best and config.checkpoint.keep_best, None

        taken, stop, owed = job.first_step, None, job.evaluation_owed
        if owed:
            best, stop = evaluate(taken)
            owed = stop is not None
            if not owed:
                checkpointer.save(taken, best)
            window.restart()
        for step in range(job.first_step, last_step):
            if stop is not None:
                break
            first = step == job.first_step
            control.progress(step, "start" if first else "input")  # loader workers start with the first clips
            micro_batches = window.timed_input(step, lambda: [next(batches) for _ in range(job.execution.accumulation)])
            control.progress(step, "first step" if first else "step")
            taken = step + 1
            measured = diagnostics if taken % config.logger.every_steps == 0 else None
            with window.timed_step():
                totals = job.trainer.step(step, micro_batches, measured)
            window.add(step, micro_batches, totals)
            in_flight.wait()
            stop = control.agreed_stop(step, in_flight.limit, signal.received)
            ended = stop is not None or taken == last_step
            checkpointer.report()
            save_now = False
            if taken % config.logger.every_steps == 0 or ended:
                save_now = window.record(taken, records, checkpointer.due_by_clock())
            if measured is not None and (values := measured.values()):
                records.write("diagnostics", taken, **values)
            epoch, best = epoch_ends.get(taken), False
            owed = taken == recipe.total_steps or (epoch is not None and epoch % config.evaluation.every_epochs == 0)
            if owed and stop is None:
                control.progress(step, "evaluation")
                window.settle(records)
                best, stop = evaluate(taken)
                owed = stop is not None
                window.restart()
            if ended or owed or save_now or best or checkpointer.due(taken, epoch):
                control.progress(step, "checkpoint")
                window.settle(records)
                checkpointer.save(taken, best, evaluation_owed=owed)
                window.restart()
        window.close(taken, records)
        failed = checkpointer.finish()
        if stop is None:
            check_finished(failed, taken)
            return EXIT_DONE
        saved = "with a checkpoint" if failed is None else f"with none behind step {checkpointer.newest_step}"
        owing = ", and the evaluation there still to be made" if owed else ""
        records.info(
            f"stopped by {stop} after step {taken}, {saved}{owing}: the same command with run_id={config.run_id} goes on"
        )
        return StopSignal.EXIT_CODES[stop]


def _diagnostics(job: Job) -> GradientDiagnostics:
    return GradientDiagnostics(job.trainer.network, job.trainer.optimizer, job.backend, job.execution)


class _StepsInFlight:
    """Keeps the host at most STEPS_IN_FLIGHT steps ahead of its GPU; a CPU has done a step when the call returns."""

    def __init__(self, device: torch.device) -> None:
        self._events: deque[torch.cuda.Event] | None = deque() if device.type == "cuda" else None
        self.limit = STEPS_IN_FLIGHT if device.type == "cuda" else 0

    def wait(self) -> None:
        if self._events is None:
            return
        event = torch.cuda.Event(blocking=True)  # the core is for decoders meanwhile
        event.record()
        self._events.append(event)
        if len(self._events) > STEPS_IN_FLIGHT:
            self._events.popleft().synchronize()

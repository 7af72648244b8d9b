"""The training loop: steps until the recipe's end, with records, evaluations and checkpoints on the way."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from distributed.batch_norm import average_running_statistics, recompute_running_statistics
from pipelines.loader import BadClipRecord, ClipBatch

from .bad_steps import BadStep, BadSteps
from .diagnostics import Diagnostics
from .errors import EXIT_DONE, DataError
from .evaluation import Evaluation, assess
from .job import Job
from .records import Records
from .saves import Saves, check_finished
from .signals import StopSignal
from .stragglers import BusyClock, Stragglers

STEPS_IN_FLIGHT = 2  # how far a host runs ahead of its GPU; bounds when ranks can agree to stop


def train(job: Job, records: Records) -> int:
    """Train to the recipe's end, or to a stop that all ranks agree on; the exit code."""
    config, recipe, control = job.config, job.recipe, job.control
    epoch_ends = {recipe.epoch_end_step(epoch): epoch for epoch in range(1, int(recipe.epochs) + 2)}
    last_step = min(recipe.total_steps, config.max_steps or recipe.total_steps)
    plan = job.execution.stream_positions(job.backend.topology.rank, job.first_step, last_step)
    batches = job.loader(job.training_clips).batches(plan)
    window = _Window(job)
    diagnostics = _diagnostics(job) if config.logger.diagnostics else None
    in_flight = _StepsInFlight(job.backend.device)
    with StopSignal() as signal, Saves(job, records) as saves:
        for step in range(job.first_step, last_step):
            control.progress(step, "input")
            micro_batches = window.timed_input(lambda: [next(batches) for _ in range(job.execution.accumulation)])
            window.bad_clips(step, micro_batches)
            control.progress(step, "first step" if step == job.first_step else "step")
            taken = step + 1
            measured = diagnostics if taken % config.logger.every_steps == 0 else None
            with window.timed_step():
                totals = job.trainer.step(step, micro_batches, measured)
            window.add(step, micro_batches, totals)
            in_flight.wait()
            stop = control.agreed_stop(step, in_flight.limit, signal.received)
            ended = stop is not None or taken == last_step
            saves.report()
            save_now = False
            if taken % config.logger.every_steps == 0 or ended:
                save_now = window.record(taken, records, saves.due_by_clock())
            if measured is not None and (values := measured.values()):
                records.write("diagnostics", taken, **values)
            epoch, best = epoch_ends.get(taken), False
            if taken == recipe.total_steps or (epoch is not None and epoch % config.evaluation.every_epochs == 0):
                control.progress(step, "evaluation")
                window.settle(records)
                best = _evaluate(job, records, taken) and config.checkpoint.keep_best
                window.restart()
            if ended or save_now or best or saves.due(taken, epoch):
                control.progress(step, "checkpoint")
                window.settle(records)
                saves.save(taken, best)
                window.restart()
            if ended:
                failed = saves.finish()
                if stop is None:
                    check_finished(failed, taken)
                    break
                saved = "with a checkpoint" if failed is None else f"with none behind step {saves.newest_step}"
                records.say(
                    f"stopped by {stop} after step {taken}, {saved}: the same command with run_id={config.run_id} goes on"
                )
                return StopSignal.EXIT_CODES[stop]
    return EXIT_DONE


def score(job: Job, step: int) -> Evaluation:
    """Evaluate after `step` steps on the validation clips: the weights, or their average, with statistics that all ranks share."""
    trainer = job.trainer
    with trainer.average.in_place_of_weights() if trainer.average else nullcontext():
        if job.config.batch.precise_bn_steps:
            _recompute_statistics(job, step)
        else:
            average_running_statistics(trainer.network, job.backend)
        return assess(
            trainer.network,
            trainer.normalise,
            job.validation_clips,
            job.loader(job.validation_clips),
            job.backend,
            job.config.evaluation.batch,
            progress=lambda _: job.control.progress(step - 1, "evaluation"),
        )


def _recompute_statistics(job: Job, step: int) -> None:
    """Precise batch norm over the clips of the steps that would come next: on any world the same, at the end of the run too.

    They stay: the checkpoint then scores what its evaluation did, and training uses running statistics only to keep them up.
    Clips that cannot be decoded are replaced by rule, and reported when training comes to them.
    """
    plan = job.execution.stream_positions(job.backend.topology.rank, step, step + job.config.batch.precise_bn_steps)
    batches = job.loader(job.training_clips).batches(plan)
    inputs = (job.trainer.normalise(batch.video_NTCHW) for batch in batches)
    recompute_running_statistics(job.trainer.network, job.backend, inputs)


def _evaluate(job: Job, records: Records, step: int) -> bool:
    """Whether it is the best evaluation of the run so far."""
    started_s = time.monotonic()
    evaluation = score(job, step)
    scores, missing = evaluation.scores, evaluation.missing
    for record in missing:
        records.bad_clip(job.folder, split="val", step=step, **vars(record))
    duration_s = round(time.monotonic() - started_s, 3)
    epoch = round(step / job.recipe.steps_per_epoch, 3)
    protocol = job.validation_clips.protocol.name
    records.write("evaluation", step, epoch=epoch, duration_s=duration_s, protocol=protocol, **scores.as_dict())
    records.say(scores.describe(f"step {step:6d}  validation"))
    if scores.missing > job.config.data.max_bad_clips:
        raise DataError(_too_many_bad(job, f"{scores.missing} validation clips are missing", missing))
    best = scores.top1_percent > job.best_top1_percent
    job.best_top1_percent = max(job.best_top1_percent, scores.top1_percent)
    return best


def _diagnostics(job: Job) -> Diagnostics:
    return Diagnostics(job.trainer.network, job.trainer.optimizer, job.backend, job.execution)


class _StepsInFlight:
    """Keeps the host at most STEPS_IN_FLIGHT steps ahead of its GPU; a CPU has done a step when the call returns."""

    def __init__(self, device: torch.device) -> None:
        self._events: deque[torch.cuda.Event] | None = deque() if device.type == "cuda" else None
        self.limit = STEPS_IN_FLIGHT if device.type == "cuda" else 0

    def wait(self) -> None:
        if self._events is None:
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > STEPS_IN_FLIGHT:
            self._events.popleft().synchronize()


class _Window:
    """What is noted between two training records: how each step went, on the device, and times on the host."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._bad_clips: list[tuple[int, BadClipRecord]] = []
        self._bad_clips_seen = 0
        self._bad_steps = BadSteps(job)
        self._unsettled: list[tuple[int, list[Tensor], Tensor]] = []
        self._busy = BusyClock(job.trainer.network, job.backend)
        self._stragglers = Stragglers(job.backend.topology.size)
        self.restart()

    def restart(self) -> None:
        self._totals = torch.zeros(3, dtype=torch.float64)
        self._steps = 0
        self._input_s = 0.0
        self._started_s = time.monotonic()

    def timed_input(self, fetch: Callable[[], list[ClipBatch]]) -> list[ClipBatch]:
        started_s = time.monotonic()
        micro_batches = fetch()
        self._waited_s = time.monotonic() - started_s
        self._input_s += self._waited_s
        return micro_batches

    @contextmanager
    def timed_step(self) -> Iterator[None]:
        self._busy.start(self._waited_s)
        yield
        self._busy.stop()

    def add(self, step: int, micro_batches: list[ClipBatch], totals: Tensor) -> None:
        """Note a step that was taken; `totals` as Trainer.step returns them."""
        self._unsettled.append((step, [batch.row_N for batch in micro_batches], totals))
        self._steps += 1

    def settle(self, records: Records) -> None:
        """Learn how the steps went since the last time; the one place in the loop where a host waits for its device.

        Raises DivergedError when too many of them were bad.
        """
        if not self._unsettled:
            return
        totals_S4 = torch.stack([totals for _, _, totals in self._unsettled]).cpu()
        bad_S = totals_S4[:, 3] > 0
        self._totals += totals_S4[~bad_S, :3].sum(0)
        steps = [
            (BadStep(step, torch.cat(row_N).tolist(), loss), bad)
            for (step, row_N, _), loss, bad in zip(
                self._unsettled, totals_S4[:, 0].tolist(), bad_S.tolist(), strict=True
            )
        ]
        self._unsettled.clear()
        self._bad_steps.report(steps, records)

    def bad_clips(self, step: int, micro_batches: list[ClipBatch]) -> None:
        """Note replaced clips; more than the limit on this rank alone end the run at once."""
        for batch in micro_batches:
            self._bad_clips += [(step, record) for record in batch.bad_clips]
        if len(self._bad_clips) > self._job.config.data.max_bad_clips:
            raise DataError(
                _too_many_bad(
                    self._job,
                    f"step {step} needs clips that cannot be decoded",
                    [record for _, record in self._bad_clips],
                )
            )

    def record(self, step: int, records: Records, save_here: bool) -> bool:
        """Join the ranks' sums and write a training record of the steps that were not bad, if any.

        Returns whether any rank wants to save here: what rank 0's clock says rides on the message of the sums.
        """
        self.settle(records)
        job = self._job
        busy_s, messages_s, busy_steps = self._busy.read()
        busy_R = self._totals.new_zeros(job.backend.topology.size)
        busy_R[job.backend.topology.rank] = busy_s
        counts = self._totals.new_tensor([float(len(self._bad_clips)), float(save_here)])
        sums = torch.cat([self._totals, counts, busy_R]).to(job.backend.device)
        job.backend.all_reduce_(sums, "train.record")
        sums = sums.cpu()
        loss, right, clips, bad, save_now = sums[: -len(busy_R)].tolist()
        self._name_stragglers(step, sums[-len(busy_R) :], busy_steps, records)
        duration_s = time.monotonic() - self._started_s
        if clips:
            records.train(
                step,
                epoch=round(step / job.recipe.steps_per_epoch, 3),
                loss=loss / clips,
                top1_percent=100 * right / clips,
                learning_rate=job.recipe.schedule.learning_rate(step - 1),
                step_s=duration_s / max(1, self._steps),
                clips_per_s=clips / duration_s,
                input_wait_percent=100 * self._input_s / duration_s,
                **self._batch_norm_cost(messages_s, busy_steps),
            )
        if bad:
            self._report_bad_clips(records)
        self.restart()
        return bool(save_now)

    def _batch_norm_cost(self, messages_s: float, steps: int) -> dict[str, float]:
        """What this rank's messages of batch norm over ranks took; on GPUs the host does not see it."""
        if self._job.execution.bn_ranks == 1 or self._job.backend.device.type != "cpu":
            return {}
        return {"batch_norm_messages_s": messages_s / max(1, steps)}

    def _name_stragglers(self, step: int, busy_R: Tensor, steps: int, records: Records) -> None:
        named = self._stragglers.add(busy_R, steps)
        if not named:
            return
        hosts = self._job.backend.all_gather_objects(self._job.backend.topology.host)
        for rank, busy_s, median_s in named:
            records.say(
                f"rank {rank} on {hosts[rank]} holds the others up: it is busy for {busy_s:.3f} s a step, the median rank for "
                f"{median_s:.3f} s"
            )
            records.write("straggler", step, rank=rank, host=hosts[rank], busy_s=busy_s, median_busy_s=median_s)

    def _report_bad_clips(self, records: Records) -> None:
        job = self._job
        everywhere = [pair for part in job.backend.all_gather_objects(self._bad_clips) for pair in part]
        for step, record in everywhere:
            records.bad_clip(job.folder, split="train", step=step, **vars(record))
        self._bad_clips_seen += len(everywhere)
        self._bad_clips.clear()
        records.say(
            f"{self._bad_clips_seen} undecodable training clips were replaced so far: see {job.folder.bad_clips.name}"
        )
        if self._bad_clips_seen > job.config.data.max_bad_clips:
            raise DataError(
                _too_many_bad(
                    job,
                    f"{self._bad_clips_seen} training clips could not be decoded",
                    [record for _, record in everywhere],
                )
            )


def _too_many_bad(job: Job, what: str, bad: list[BadClipRecord]) -> str:
    first = f": {bad[0].reason}" if bad else ""
    return (
        f"{what}, data.max_bad_clips={job.config.data.max_bad_clips} allows no more{first}. "
        f"Fix: restore the file, or make the manifest anew ({job.config.data.prepare or 'prepare.py'}), or raise data.max_bad_clips"
    )

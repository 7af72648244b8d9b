"""Collect what happens between two training records, and write the record."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

from pipelines.loading.clips import ClipBatch
from training.job import Job

from .bad_clips import BadClips
from .device import peak_clips_per_s, peak_memory_bytes
from .eta import Eta
from .input_stalls import WARM_UP_STEPS, ClipWorkers, InputStalls
from .metrics_log import MetricsLog
from .rank_times import RankTimes, rank_values
from .skipped_steps import SkippedSteps, TakenStep
from .step_clock import StepClock, StepTimes
from .stragglers import Stragglers


class LogInterval:
    """The steps since the last training record.

    Sums stay on the device, times on the host. Shapes: S steps, R ranks, 4 values of a step as Trainer.step returns them.
    """

    def __init__(self, job: Job, last_step: int, evaluation_steps: Collection[int]) -> None:
        """`last_step` and `evaluation_steps`: as in Eta."""
        self._job = job
        self._bad_clips = BadClips(job)
        self._skipped_steps = SkippedSteps(job)
        self._unread: list[tuple[int, list[Tensor], Tensor]] = []
        self._clock = StepClock(job.trainer.network, job.backend)
        self._stragglers = Stragglers(job.backend.topology.size)
        self._input_stalls = InputStalls(ClipWorkers.of(job.config.pipeline, job.backend))
        self._eta = Eta(last_step, evaluation_steps)
        self._peak_clips_per_s = peak_clips_per_s(job.config, job.backend.device)
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now. Steps that `settle` has not read yet stay."""
        self._totals = torch.zeros(3, dtype=torch.float64)
        self._steps = 0
        self._input_s = 0.0
        self._started_s = time.monotonic()
        self._clock.restart()

    def timed_input(self, step: int, fetch: Callable[[], list[ClipBatch]]) -> list[ClipBatch]:
        """Return the micro-batches that `fetch` waits for. Raises DataError if too many of their clips were replaced."""
        self._clock.begin_input()
        started_s = time.monotonic()
        micro_batches = fetch()
        self._input_s += time.monotonic() - started_s
        self._bad_clips.note(step, micro_batches)
        return micro_batches

    @contextmanager
    def timed_step(self) -> Iterator[Callable[[str], None]]:
        """Time a step; the value of the context is called as each of its phases begins."""
        self._clock.begin_step()
        yield self._clock.mark
        self._clock.end_step()

    def evaluated(self, duration_s: float) -> None:
        """Begin a new interval after an evaluation."""
        self._eta.evaluated(duration_s)
        self.restart()

    def add(self, step: int, micro_batches: list[ClipBatch], totals: Tensor) -> None:
        """Add a step that was taken; `totals` as Trainer.step returns them."""
        self._unread.append((step, [batch.row_N for batch in micro_batches], totals))
        self._steps += 1

    def record_first_step(self, step: int, log: MetricsLog) -> None:
        """Wait for this start's first step, and record how long it took, with its wait for clips. Later steps do not wait."""
        device = self._job.backend.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        duration_s = time.monotonic() - self._started_s
        log.write("first_step", step, duration_s=round(duration_s, 3), input_wait_s=round(self._input_s, 3))

    def settle(self, log: MetricsLog) -> None:
        """Read the results of the steps since the last call. Only here does the training loop's host wait for its device.

        Raises DivergedError if too many steps in a row were skipped.
        """
        if not self._unread:
            return
        totals_S4 = torch.stack([totals for _, _, totals in self._unread]).cpu()
        skipped_S = totals_S4[:, 3] > 0
        self._totals += totals_S4[~skipped_S, :3].sum(0)
        steps = [
            TakenStep(step, torch.cat(row_N).tolist(), loss, skipped)
            for (step, row_N, _), loss, skipped in zip(
                self._unread, totals_S4[:, 0].tolist(), skipped_S.tolist(), strict=True
            )
        ]
        self._unread.clear()
        self._skipped_steps.report(steps, log)

    def record(self, step: int, log: MetricsLog, save_here: bool) -> bool:
        """Sum over ranks and write a training record of the steps that were not skipped, if any; collective.

        Returns True if any rank passes `save_here`: rank 0 decides by its clock, and the all-reduce of the sums carries that.
        """
        self.settle(log)
        times, read_s = self._clock.read(), time.monotonic()
        steps = max(1, self._steps)
        own = rank_values(times, self._input_s / steps, peak_memory_bytes(self._job.backend.device))
        counts = self._totals.new_tensor([float(self._bad_clips.noted), float(save_here)])
        sums, values_VR = self._reduce(torch.cat([self._totals, counts]), own)
        bad_clips, save_now = sums[3:].tolist()
        ranks = RankTimes(values_VR)
        self._log_stragglers(step, ranks.own_R * times.steps, times.steps, log)
        now_s = time.monotonic()
        duration_s = now_s - self._started_s
        # Waiting for the other ranks' values is work between two steps.
        times.phases_s["between_steps"] += now_s - read_s
        self._eta.add(self._steps, duration_s)
        stall = self._input_stalls.add(self._steps, duration_s, ranks.input_wait_R.max().item() * steps)
        if stall:
            log.info(f"step {step:6d}  {stall}")
        self._log_training(step, sums[:3].tolist(), duration_s, times, ranks, log)
        if bad_clips:
            self._bad_clips.report(log)
        self.restart()
        return bool(save_now)

    def close(self, step: int, log: MetricsLog) -> None:
        """Log the whole run's share of input stalls."""
        percent = self._input_stalls.wait_percent
        if percent is not None:
            log.write("input", step, wait_percent=percent)
            log.info(f"input stall: {percent:.1f}% of the time after the first {WARM_UP_STEPS} steps")

    def _reduce(self, values: Tensor, own: list[float]) -> tuple[Tensor, Tensor]:
        """Return the sums of `values` over ranks, and each rank's `own`, (V, R). One all-reduce carries both."""
        topology = self._job.backend.topology
        own_VR = values.new_zeros(len(own), topology.size)
        own_VR[:, topology.rank] = values.new_tensor(own)
        message = torch.cat([values, own_VR.flatten()]).to(self._job.backend.device)
        self._job.backend.all_reduce_(message, "train.record")
        sums, all_ranks = message.cpu().split([len(values), own_VR.numel()])
        return sums, all_ranks.view_as(own_VR)

    def _log_training(
        self, step: int, totals: list[float], duration_s: float, times: StepTimes, ranks: RankTimes, log: MetricsLog
    ) -> None:
        loss, right, clips = totals
        if not clips:
            return
        job, step_s = self._job, duration_s / max(1, self._steps)
        clips_per_s = clips / duration_s
        per_device = clips_per_s / job.backend.topology.size
        log.train(
            step,
            epoch=round(step / job.recipe.steps_per_epoch, 3),
            loss=loss / clips,
            top1_percent=100 * right / clips,
            learning_rate=job.recipe.schedule.learning_rate(step - 1),
            step_s=step_s,
            clips_per_s=clips_per_s,
            clips_per_s_per_device=per_device,
            mfu_percent=None if self._peak_clips_per_s is None else 100 * per_device / self._peak_clips_per_s,
            input_wait_percent=100 * self._input_s / duration_s,
            **{f"{phase}_s": spent_s / max(1, times.steps) for phase, spent_s in times.phases_s.items()},
            **ranks.fields(step_s),
            **self._batch_norm_cost(times),
            eta_s=self._eta.seconds(step),
        )

    def _batch_norm_cost(self, times: StepTimes) -> dict[str, float]:
        """Return this rank's time per step in messages of batch norm over ranks. On GPUs the host cannot measure it."""
        if self._job.execution.bn_ranks == 1 or self._job.backend.device.type != "cpu":
            return {}
        return {"batch_norm_messages_s": times.messages_s / max(1, times.steps)}

    def _log_stragglers(self, step: int, own_R: Tensor, steps: int, log: MetricsLog) -> None:
        stragglers = self._stragglers.add(own_R, steps)
        if not stragglers:
            return
        hosts = self._job.backend.all_gather_objects(self._job.backend.topology.host)
        for straggler in stragglers:
            host = hosts[straggler.rank]
            log.info(
                f"straggler: rank {straggler.rank} on {host} takes {straggler.busy_s:.3f} s per step for its own part, the "
                f"median rank {straggler.median_busy_s:.3f} s"
            )
            log.write("straggler", step, host=host, **asdict(straggler))

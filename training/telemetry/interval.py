"""What is noted between two training records: how each step went, and what it took. The record is made of it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

from pipelines.loading.clips import ClipBatch
from training.job import Job

from .bad_clips import BadClips
from .bad_steps import BadStep, BadSteps
from .input_stalls import WARM_UP_STEPS, ClipWorkers, InputWatch
from .metrics_log import MetricsLog
from .stragglers import BusyClock, Stragglers


class LogInterval:
    """The steps since the last training record, of which the device keeps the sums and the host the times.

    Shapes: S steps, R ranks; the 4 of a step are as Trainer.step returns them.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._bad_clips = BadClips(job)
        self._bad_steps = BadSteps(job)
        self._unsettled: list[tuple[int, list[Tensor], Tensor]] = []
        self._busy = BusyClock(job.trainer.network, job.backend)
        self._stragglers = Stragglers(job.backend.topology.size)
        self._input = InputWatch(ClipWorkers.of(job.config, job.backend))
        self.restart()

    def restart(self) -> None:
        """Forget the steps that are settled, and count time from now on."""
        self._totals = torch.zeros(3, dtype=torch.float64)
        self._steps = 0
        self._input_s = 0.0
        self._started_s = time.monotonic()

    def timed_input(self, step: int, fetch: Callable[[], list[ClipBatch]]) -> list[ClipBatch]:
        """The micro-batches that `fetch` waits for. Raises DataError when too many of their clips had to be replaced."""
        self._busy.ask()
        started_s = time.monotonic()
        micro_batches = fetch()
        self._input_s += time.monotonic() - started_s
        self._bad_clips.note(step, micro_batches)
        return micro_batches

    @contextmanager
    def timed_step(self) -> Iterator[None]:
        self._busy.start()
        yield
        self._busy.stop()

    def add(self, step: int, micro_batches: list[ClipBatch], totals: Tensor) -> None:
        """Note a step that was taken; `totals` as Trainer.step returns them."""
        self._unsettled.append((step, [batch.row_N for batch in micro_batches], totals))
        self._steps += 1

    def settle(self, records: MetricsLog) -> None:
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

    def record(self, step: int, records: MetricsLog, save_here: bool) -> bool:
        """Join the ranks' sums and write a training record of the steps that were not bad, if any.

        Returns whether any rank wants to save here: what rank 0's clock says rides on the message of the sums.
        """
        self.settle(records)
        job = self._job
        busy = self._busy.read()
        times_3R = self._totals.new_zeros(3, job.backend.topology.size)
        times_3R[:, job.backend.topology.rank] = self._totals.new_tensor([busy.own_s, busy.queued_s, self._input_s])
        counts = self._totals.new_tensor([float(self._bad_clips.noted), float(save_here)])
        sums = torch.cat([self._totals, counts, times_3R.flatten()]).to(job.backend.device)
        job.backend.all_reduce_(sums, "train.record")
        sums = sums.cpu()
        loss, right, clips, bad, save_now = sums[: -times_3R.numel()].tolist()
        own_R, queued_R, input_R = sums[-times_3R.numel() :].view_as(times_3R)
        self._name_stragglers(step, own_R, queued_R, busy.steps, records)
        duration_s = time.monotonic() - self._started_s
        said = self._input.add(self._steps, duration_s, input_R.max().item())
        if said:
            records.info(f"step {step:6d}  {said}")
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
                **self._batch_norm_cost(busy.messages_s, busy.steps),
            )
        if bad:
            self._bad_clips.report(records)
        self.restart()
        return bool(save_now)

    def close(self, step: int, records: MetricsLog) -> None:
        """Say what the whole run waited for its clips."""
        percent = self._input.wait_percent
        if percent is not None:
            records.write("input", step, wait_percent=percent)
            records.info(f"after the first {WARM_UP_STEPS} steps the steps waited for clips {percent:.1f}% of the time")

    def _batch_norm_cost(self, messages_s: float, steps: int) -> dict[str, float]:
        """What this rank's messages of batch norm over ranks took; on GPUs the host does not see it."""
        if self._job.execution.bn_ranks == 1 or self._job.backend.device.type != "cpu":
            return {}
        return {"batch_norm_messages_s": messages_s / max(1, steps)}

    def _name_stragglers(self, step: int, own_R: Tensor, queued_R: Tensor, steps: int, records: MetricsLog) -> None:
        stragglers = self._stragglers.add(own_R, queued_R, steps)
        if not stragglers:
            return
        hosts = self._job.backend.all_gather_objects(self._job.backend.topology.host)
        for straggler in stragglers:
            host = hosts[straggler.rank]
            why = f"; it waits for cores of {host}, which other programs have" if straggler.queued else ""
            records.info(
                f"rank {straggler.rank} on {host} holds the others up: it is busy for {straggler.busy_s:.3f} s a step, the median "
                f"rank for {straggler.median_busy_s:.3f} s{why}"
            )
            records.write("straggler", step, host=host, **asdict(straggler))

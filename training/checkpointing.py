"""Decide when a run saves, collect what a checkpoint holds, and log each write. Rank 0 writes in the background."""

import time
from collections.abc import Callable
from types import TracebackType

from distributed.batch_norm.running_statistics import averaged_running_statistics, running_statistics_by_rank
from distributed.checkpoint.store import Checkpoint
from distributed.checkpoint.writer import CheckpointWriter, Written
from training.build.class_names import digest_of
from training.optim.optimizers import step_counts
from training.runs.resume import STATISTICS_BY_RANK, state_tensors
from training.telemetry.metrics_log import MetricsLog

from .job import Job
from .last_checkpoint import LastCheckpoint, LastWrite, wait_for_all

_LAST_WRITE_LIMIT_S = 10.0
"""Time that a failed run waits for its last write. Less than the other ranks are given to end."""


class Checkpointer:
    """Saves the checkpoints of one run. All ranks construct it, and save together."""

    def __init__(self, job: Job, records: MetricsLog) -> None:
        self._job, self._records = job, records
        self._writer: CheckpointWriter | None = None
        if job.backend.topology.rank == 0:
            self._writer = CheckpointWriter(
                job.folder.checkpoints, job.config.checkpoint.keep, job.control.check_run_lock
            )
            job.control.before_end = self._wait_briefly
        self._newest_s = time.monotonic()
        self._newest_step = job.first_step
        self._failed: str | None = None
        self._finishing = False

    def due(self, taken: int, epoch: int | None) -> bool:
        """Return whether a checkpoint is due after `taken` steps, which end `epoch`, if any."""
        checkpoint = self._job.config.checkpoint
        by_steps = checkpoint.every_steps is not None and taken % checkpoint.every_steps == 0
        return by_steps or (epoch is not None and epoch % checkpoint.every_epochs == 0)

    def due_by_clock(self) -> bool:
        """Return on rank 0 whether `checkpoint.every_minutes` have passed. Other ranks return False."""
        minutes = self._job.config.checkpoint.every_minutes
        return self._writer is not None and minutes is not None and time.monotonic() - self._newest_s >= 60 * minutes

    def save(self, step: int, is_best: bool, evaluation_owed: bool = False) -> None:
        """Take a checkpoint after `step` steps and start to write it. Collective.

        `is_best`: the evaluation here is the best so far. `evaluation_owed`: it is due and has not been made, so the start
        that resumes from here makes it.

        Training state stays as it was, to the bit: only the checkpoint has BN's running statistics averaged over ranks. They
        follow each rank's own groups, and the network evaluates with their mean. Their update is linear, so a run that
        resumes from the mean ends with the same mean up to rounding, at any world size. Bit-equality, which deterministic
        mode guarantees, needs each rank's own: in that mode the checkpoint has them too (0.3 GB for 1,536 ranks of
        ResNet-50, too much to do always).
        """
        job = self._job
        trainer, network = job.trainer, job.trainer.network
        statistics = averaged_running_statistics(network, job.backend)
        by_rank = {}
        if job.config.numerics.deterministic and job.backend.topology.size > 1:
            by_rank[STATISTICS_BY_RANK] = running_statistics_by_rank(network, job.backend)
        if self._writer is None:
            return
        classes = job.training_clips.source.manifest.classes
        state = {
            "step": step,
            "best_top1_percent": job.best_top1_percent,
            "evaluation_owed": evaluation_owed,
            "recipe": job.recipe.as_dict(),
            "classes": classes,
            "classes_sha256": digest_of(classes),
            "code": job.code,
            "scaler": trainer.scaler.state_dict(),
            "step_counts": step_counts(trainer.optimizer),
        }
        tensors = state_tensors(network, trainer.optimizer, trainer.ema) | by_rank
        self._writer.save(Checkpoint(network.state_dict() | statistics, tensors, state), is_best)
        self._newest_s = time.monotonic()

    def report(self) -> str | None:
        """Log the writes that have ended since the last call. Returns why the newest one failed, if it did."""
        for written in self._writer.ended() if self._writer is not None else ():
            self._record(written)
        return self._failed

    def finish(self, step: int, stopped: bool, stop_wanted: Callable[[], bool]) -> LastWrite:
        """Wait on all ranks for the last write, which is tried again if it fails. No other write follows. Collective.

        `stopped`: the run was stopped by a signal. `stop_wanted` returns whether any rank got a stop signal.
        """
        self._finishing, updates = True, None
        if self._writer is not None:
            last = LastCheckpoint(self._job, self._writer, self._records.info, self.report)
            updates = last.updates(stopped, stop_wanted)
        return wait_for_all(self._job, step, updates, stop_wanted)

    @property
    def newest_step(self) -> int:
        """On rank 0: step of the newest checkpoint, from which the next start would resume."""
        return self._newest_step

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """On failure, wait briefly for the checkpoint being written: it is from an earlier, healthy step."""
        self._wait_briefly()

    def _wait_briefly(self) -> None:
        if self._writer is not None:
            self._writer.wait(_LAST_WRITE_LIMIT_S)

    def _record(self, written: Written) -> None:
        times = {"duration_s": round(written.duration_s, 3), "stall_s": round(written.stall_s, 3)}
        # Waited for the write before: checkpoints are due faster than the disk takes them.
        if written.waited_s > 0.001:
            times["waited_s"] = round(written.waited_s, 3)
        self._failed = written.failed
        if written.failed is None:
            self._newest_step = written.step
            self._records.write("checkpoint", written.step, **times)
            return
        self._records.info(
            f"NO CHECKPOINT at step {written.step}: {written.failed}{'' if self._finishing else '. Training continues'}"
        )
        self._records.write("checkpoint", written.step, **times, failed=written.failed)

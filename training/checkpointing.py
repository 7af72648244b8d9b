"""When a run saves, what it saves, and what becomes known of it. Rank 0 writes, behind the training."""

import time
from types import TracebackType

from distributed.batch_norm.running_statistics import averaged_running_statistics, running_statistics_by_rank
from distributed.checkpoint.store import Checkpoint, CheckpointError
from distributed.checkpoint.writer import CheckpointWriter, Written
from training.optim.optimizers import step_counts
from training.runs.resume import STATISTICS_BY_RANK, state_tensors
from training.telemetry.metrics_log import MetricsLog

from .job import Job

_LAST_WRITE_LIMIT_S = 10.0  # of a run that failed: less than what the other ranks are given to end


class Checkpointer:
    """The checkpoints of one run; all ranks make it, and save together."""

    def __init__(self, job: Job, records: MetricsLog) -> None:
        self._job, self._records = job, records
        self._writer: CheckpointWriter | None = None
        if job.backend.topology.rank == 0:
            writer = CheckpointWriter(job.folder.checkpoints, job.config.checkpoint.keep)
            self._writer = writer
            job.control.before_end = lambda: writer.wait(_LAST_WRITE_LIMIT_S)
        self._newest_s = time.monotonic()
        self._newest_step = job.first_step
        self._failed: str | None = None
        self._finishing = False

    def due(self, taken: int, epoch: int | None) -> bool:
        """Whether the configuration wants a checkpoint after `taken` steps, which end `epoch`, if any."""
        checkpoint = self._job.config.checkpoint
        by_steps = checkpoint.every_steps is not None and taken % checkpoint.every_steps == 0
        return by_steps or (epoch is not None and epoch % checkpoint.every_epochs == 0)

    def due_by_clock(self) -> bool:
        """The same of `checkpoint.every_minutes`, by rank 0's clock alone: other ranks must hear of it."""
        minutes = self._job.config.checkpoint.every_minutes
        return self._writer is not None and minutes is not None and time.monotonic() - self._newest_s >= 60 * minutes

    def save(self, step: int, best: bool, evaluation_owed: bool = False) -> None:
        """Take a checkpoint after `step` steps, and begin to write it; collective. `best`: of all evaluations so far.

        `evaluation_owed`: the evaluation behind this step has not been made, and whoever goes on from here has to make it.

        Training is left as it was, to the bit: batch norm's running statistics are averaged over ranks in the checkpoint alone.
        They follow each rank's own groups, and only their mean says how the network evaluates. Their update is linear, so a run
        that goes on from the mean ends with the same mean up to rounding, on any world. Bit for bit, as the deterministic mode
        promises, it needs each rank's own: there the checkpoint has them beside the mean (for 1,536 ranks of ResNet-50 0.3 GB,
        which is why not always).
        """
        job = self._job
        trainer, network = job.trainer, job.trainer.network
        statistics = averaged_running_statistics(network, job.backend)
        by_rank = {}
        if job.config.numerics.deterministic and job.backend.topology.size > 1:
            by_rank[STATISTICS_BY_RANK] = running_statistics_by_rank(network, job.backend)
        if self._writer is None:
            return
        state = {
            "step": step,
            "best_top1_percent": job.best_top1_percent,
            "evaluation_owed": evaluation_owed,
            "recipe": job.recipe.as_dict(),
            "code": job.code,
            "scaler": trainer.scaler.state_dict(),
            "step_counts": step_counts(trainer.optimizer),
        }
        tensors = state_tensors(network, trainer.optimizer, trainer.ema) | by_rank
        self._writer.save(Checkpoint(network.state_dict() | statistics, tensors, state), best)
        self._newest_s = time.monotonic()

    def report(self) -> None:
        """Record the saves whose writes have ended; costs nothing where there are none."""
        for written in self._writer.ended() if self._writer is not None else ():
            self._record(written)

    def finish(self) -> str | None:
        """Wait for the last write, on all ranks, and say why it failed, if it did: nothing is tried again behind it."""
        self._finishing = True
        if self._writer is not None:
            self._writer.wait()
            self.report()
        failed: str | None = self._job.backend.broadcast_object(self._failed)
        return failed

    @property
    def newest_step(self) -> int:
        """On rank 0: where a start behind this one goes on."""
        return self._newest_step

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A run that fails gives the write that is under way a moment: it is of an earlier step, and as good as ever."""
        if self._writer is not None:
            self._writer.wait(_LAST_WRITE_LIMIT_S)

    def _record(self, written: Written) -> None:
        times = {"duration_s": round(written.duration_s, 3), "stall_s": round(written.stall_s, 3)}
        if written.waited_s > 0.001:  # for the write before: saves come faster than the disk takes them
            times["waited_s"] = round(written.waited_s, 3)
        self._failed = written.failed
        if written.failed is None:
            self._newest_step = written.step
            self._records.write("checkpoint", written.step, **times)
            return
        self._records.info(
            f"NO CHECKPOINT at step {written.step}: {written.failed}{'' if self._finishing else '. Training goes on'}"
        )
        self._records.write("checkpoint", written.step, **times, failed=written.failed)


def check_finished(failed: str | None, step: int) -> None:
    """Raise CheckpointError where a run's last checkpoint could not be written: its result would be lost, and called done."""
    if failed is not None:
        raise CheckpointError(
            f"the run has ended at step {step}, and its last checkpoint could not be written: {failed}. "
            "Fix: make room, or bring the folder back, and start it again: it goes on from the checkpoint before"
        )

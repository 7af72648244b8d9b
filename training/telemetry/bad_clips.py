"""Log training clips that cannot be decoded, and end the run if there are more than the configuration allows."""

from pipelines.loading.clips import BadClipRecord, ClipBatch
from training.config.schema import DataConfig
from training.errors import DataError
from training.job import Job

from .metrics_log import MetricsLog


class BadClips:
    """The replaced training clips of a run. Each rank collects its own; `report` gathers those of all ranks."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._noted: list[tuple[int, BadClipRecord]] = []
        self._total = 0

    def note(self, step: int, micro_batches: list[ClipBatch]) -> None:
        """Collect the replaced clips of a step. Raises DataError if this rank alone has more than the limit."""
        for batch in micro_batches:
            self._noted += [(step, record) for record in batch.bad_clips]
        data = self._job.config.data
        if len(self._noted) > data.max_bad_clips:
            bad = [record for _, record in self._noted]
            raise too_many_bad_clips(data, f"step {step} needs clips that cannot be decoded", bad)

    @property
    def noted(self) -> int:
        """Number of clips on this rank since the last report."""
        return len(self._noted)

    def report(self, log: MetricsLog) -> None:
        """Log the clips of all ranks since the last report; collective. Raises DataError if too many were replaced."""
        job = self._job
        noted_by_rank = job.backend.all_gather_objects([[step, vars(record)] for step, record in self._noted])
        all_ranks = [pair for noted in noted_by_rank for pair in noted]
        for step, record in all_ranks:
            log.bad_clip(job.folder, split="train", step=step, **record)
        self._total += len(all_ranks)
        self._noted.clear()
        log.info(
            f"bad clips: {self._total} undecodable training clips replaced so far, see {job.folder.bad_clips.name}"
        )
        if self._total > job.config.data.max_bad_clips:
            bad = [BadClipRecord(**record) for _, record in all_ranks]
            raise too_many_bad_clips(job.config.data, f"{self._total} training clips could not be decoded", bad)


def too_many_bad_clips(data: DataConfig, problem: str, bad: list[BadClipRecord]) -> DataError:
    """Return the error that ends a run with too many bad clips. `bad`: some of them, of which the message names the first."""
    first = f": {bad[0].reason}" if bad else ""
    return DataError(
        f"{problem}, more than data.max_bad_clips={data.max_bad_clips}{first}. "
        f"Fix: restore the file, or make the manifest again ({data.prepare or 'prepare.py'}), or raise data.max_bad_clips"
    )

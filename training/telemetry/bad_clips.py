"""What becomes known of clips that could not be decoded: listed, and an end when they are more than the configuration allows."""

from pipelines.loading.clips import BadClipRecord, ClipBatch
from training.errors import DataError
from training.job import Job

from .metrics_log import MetricsLog


class BadClips:
    """The replaced clips of a run's training; every rank notes its own, and reports them with the others."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._noted: list[tuple[int, BadClipRecord]] = []
        self._seen = 0

    def note(self, step: int, micro_batches: list[ClipBatch]) -> None:
        """Note replaced clips; more than the limit on this rank alone end the run at once."""
        for batch in micro_batches:
            self._noted += [(step, record) for record in batch.bad_clips]
        if len(self._noted) > self._job.config.data.max_bad_clips:
            bad = [record for _, record in self._noted]
            raise too_many(self._job, f"step {step} needs clips that cannot be decoded", bad)

    @property
    def noted(self) -> int:
        """On this rank since the last report."""
        return len(self._noted)

    def report(self, records: MetricsLog) -> None:
        """Write down all ranks' clips since the last report; collective. Raises DataError when too many were replaced."""
        job = self._job
        everywhere = [pair for part in job.backend.all_gather_objects(self._noted) for pair in part]
        for step, record in everywhere:
            records.bad_clip(job.folder, split="train", step=step, **vars(record))
        self._seen += len(everywhere)
        self._noted.clear()
        records.info(f"{self._seen} undecodable training clips were replaced so far: see {job.folder.bad_clips.name}")
        if self._seen > job.config.data.max_bad_clips:
            bad = [record for _, record in everywhere]
            raise too_many(job, f"{self._seen} training clips could not be decoded", bad)


def too_many(job: Job, what: str, bad: list[BadClipRecord]) -> DataError:
    """The error that ends a run with more bad clips than it may have; `bad`: some of them."""
    first = f": {bad[0].reason}" if bad else ""
    return DataError(
        f"{what}, data.max_bad_clips={job.config.data.max_bad_clips} allows no more{first}. "
        f"Fix: restore the file, or make the manifest anew ({job.config.data.prepare or 'prepare.py'}), or raise data.max_bad_clips"
    )

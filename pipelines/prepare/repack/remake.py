"""Make a new form of a data set, clip by clip: the same rows, in the same order, with other files.

Each clip is a separate task. It gets its final name once it is complete and checked, so an interrupted call resumes with the
missing clips, and any number of machines can share the work. The process that finds all clips finished writes the manifests.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.clip_names import clip_name
from pipelines.manifest import Manifest, ManifestRow, write_manifest
from pipelines.prepare.errors import DataSetError, cannot_write
from pipelines.prepare.progress import progress
from pipelines.prepare.split_report import BAD_FILES_NAME, SplitReport, check_fraction, refuse_bad, write_bad_files
from pipelines.prepare.worker_pool import Died, run_guarded

from .clip_task import ClipTask, Outcome, make_clip
from .job_array import Part, part_lock
from .target_folder import claim_folder, records_lock


@dataclass(frozen=True)
class NewForm:
    """What a command makes of each clip."""

    command: str
    work: str
    """Describes in errors what failed ("encoding")."""
    records: str
    """Folder below the target with what a later call must know."""
    options: dict[str, Any]
    """The options that determine the new clips: another call must have the same."""
    tasks: Callable[[str, Manifest], Sequence[ClipTask]]
    """List a task for each row of a split's manifest."""


@dataclass
class Remade:
    """The result of `remake`; the dicts are empty until the data set is complete."""

    new: int
    missing: int
    """Clips that other parts have yet to make; 0 when the data set is complete."""
    projection: "Projection"
    splits: dict[str, SplitReport] = field(default_factory=dict)
    bytes_before: dict[str, int] = field(default_factory=dict)
    """Source bytes of each split's clips, without those left out."""
    bytes_after: dict[str, int] = field(default_factory=dict)
    frames_after: dict[str, int] = field(default_factory=dict)

    @property
    def left(self) -> str:
        """Text for the report of a data set that is not complete yet."""
        text = f"{self.missing} clips are left for other parts or a later call"
        return ", ".join(filter(None, [text, str(self.projection)]))


class Projection:
    """The bytes that all clips will take, from those that this call has made: in proportion to their frames."""

    def __init__(self, manifests: dict[str, Manifest]) -> None:
        counts = [manifest.kinds("num_frames") for manifest in manifests.values()]
        self._all_frames = sum(frames * clips for count in counts for (frames,), clips in count.items())
        self._frames, self._bytes, self._clips = 0, 0, 0

    def add(self, source: ManifestRow, row: ManifestRow) -> None:
        """Count a clip that was made."""
        self._frames += source.num_frames
        self._bytes += row.length
        self._clips += 1

    def __str__(self) -> str:
        if not self._clips:
            return ""
        in_all = self._bytes / self._frames * self._all_frames / 1e6
        size = f"{in_all / 1e3:.1f} GB" if in_all >= 1e3 else f"{in_all:.1f} MB"
        return f"{self._bytes / self._clips / 1e3:.1f} KB per clip, about {size} in all"


def remake(
    form: NewForm, manifests: dict[str, Manifest], target: Path, workers: int, part: Part, max_bad: float
) -> Remade:
    """Make this part's clips of a data set; once all clips are done, write the manifests.

    Raises DataSetError for a target that cannot be written, and, without writing a manifest, when a larger fraction of a split
    than `max_bad` fails.
    """
    check_fraction("--max-bad", max_bad)
    inputs = {**form.options, "manifests": {name: each.digest for name, each in manifests.items()}}
    records = target / form.records
    try:
        claim_folder(target, records, inputs)
        with part_lock(part, records):
            tasks = {name: form.tasks(name, each) for name, each in manifests.items()}
            ours = [(task, manifests[name].row(task.number)) for name in tasks for task in part.of(tasks[name])]
            waiting = [task for task, row in ours if task.find_row(row) is None and task.find_reason() is None]
            failed: dict[ClipTask, str] = {}
            projection = Projection(manifests)
            by_path = {each.path: each for each in manifests.values()}
            made = _made(form, waiting, workers)
            for task, outcome in progress(made, len(waiting), form.command, note=projection.__str__):
                if outcome.row is None:
                    failed[task] = outcome.bad
                else:
                    projection.add(by_path[task.manifest].row(task.number), outcome.row)
            return _finish(form, target, manifests, tasks, failed, Remade(len(waiting), 0, projection), max_bad)
    except OSError as error:
        raise DataSetError(cannot_write(error.filename or target, error, "--to")) from error


def _made(form: NewForm, tasks: list[ClipTask], workers: int) -> Iterator[tuple[ClipTask, Outcome]]:
    """Do the tasks, and yield each with its outcome."""
    with closing(run_guarded(make_clip, tasks, workers, form.work, _name)) as results:
        for number, result in results:
            if isinstance(result, Died):
                result = Outcome(bad=result.reason)
            if result.fatal:
                raise DataSetError(result.fatal)
            yield tasks[number], result


def _name(task: ClipTask) -> str:
    return f"{task.manifest}, row {task.number},"


def _finish(
    form: NewForm,
    target: Path,
    manifests: dict[str, Manifest],
    tasks: dict[str, Sequence[ClipTask]],
    failed: dict[ClipTask, str],
    done: Remade,
    max_bad: float,
) -> Remade:
    """Write the manifests if every clip is finished or has a reason why it is left out."""
    with records_lock(target / form.records):
        rows = {name: _collect(name, manifest, tasks[name], failed, done) for name, manifest in manifests.items()}
        if done.missing:
            return Remade(done.new, done.missing, done.projection)
        write_bad_files(target / BAD_FILES_NAME, done.splits)
        for name, report in done.splits.items():
            refuse_bad(target, name, report, max_bad, 0.0)
        for name, manifest in manifests.items():
            path = target / f"{name}.arrow"
            write_manifest(path, rows[name], manifest.classes, manifest.order_groups, manifest.split)
    return done


def _collect(
    name: str, manifest: Manifest, tasks: Sequence[ClipTask], failed: dict[ClipTask, str], done: Remade
) -> list[ManifestRow]:
    """Return the new rows of a split; add its report and sizes to `done`, and count the missing clips there."""
    report, rows, before = SplitReport(listed=len(manifest)), [], 0
    for task in tasks:
        source = manifest.row(task.number)
        row = task.find_row(source)
        if row is not None:
            rows.append(replace(row, name=clip_name(source)))
            before += source.length
        elif (reason := failed.get(task) or task.find_reason()) is not None:
            report.bad.append((source.path, reason))
        else:
            done.missing += 1
    report.written = len(rows)
    done.splits[name], done.bytes_before[name] = report, before
    done.bytes_after[name] = sum(row.length for row in rows)
    done.frames_after[name] = sum(row.num_frames for row in rows)
    return rows

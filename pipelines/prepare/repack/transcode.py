"""Transcode a data set's clips: smaller images, key frames close together, the same frames.

Each clip is a separate task. It gets its final name once it is complete and checked, so an interrupted call resumes with the
missing clips, and any number of machines can share the work. The process that finds all clips finished writes the manifests.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pipelines.clip_names import clip_name
from pipelines.manifest import Manifest, ManifestRow, write_manifest
from pipelines.prepare.errors import DataSetError, cannot_write
from pipelines.prepare.progress import progress
from pipelines.prepare.split_report import BAD_FILES_NAME, SplitReport, check_fraction, refuse_bad, write_bad_files
from pipelines.prepare.worker_pool import Died, run_guarded
from pipelines.stream.modality import FLOW

from .encoders import ENCODERS
from .job_array import Part, part_lock
from .open_manifests import open_manifests, require_other_folder
from .target_folder import claim_folder, records_lock
from .transcode_clip import ClipTask, Settings, find_reason, find_row, transcode_clip

RECORDS_NAME = ".transcoding"
_CLIPS_IN_FOLDER = 1000


@dataclass
class Transcoded:
    """The result of `transcode`; the dicts are empty until the data set is complete."""

    new: int
    missing: int
    """Clips that other parts have yet to encode; 0 when the data set is complete."""
    splits: dict[str, SplitReport] = field(default_factory=dict)
    bytes_before: dict[str, int] = field(default_factory=dict)
    """Source bytes of each split's clips, without those left out."""
    bytes_after: dict[str, int] = field(default_factory=dict)


def check_settings(settings: Settings) -> None:
    """Raise DataSetError for an option that the encoder does not support."""
    encoder = ENCODERS[settings.codec]
    for option, value, least, most in (
        ("--short-side", settings.short_side, max(16, encoder.least_side), 4096),
        ("--gop", settings.gop, 1, 1000),
        ("--quality", settings.quality, 1, encoder.worst),
    ):
        if not least <= value <= most:
            raise DataSetError(f"{option} is {value}. Fix: give {least} to {most} with --codec {settings.codec}")


def transcode(root: Path, target: Path, settings: Settings, workers: int, part: Part, max_bad: float) -> Transcoded:
    """Transcode this part's clips of the data set in `root`; once all clips are done, write the manifests.

    Raises DataSetError for a target that cannot be written, and, without writing a manifest, when a larger fraction of a split
    than `max_bad` cannot be decoded, cannot be encoded, or differs too much from the source.
    """
    require_other_folder(root, target)
    check_settings(settings)
    check_fraction("--max-bad", max_bad)
    manifests = open_manifests(root)
    _refuse_flow(manifests)
    inputs = {**asdict(settings), "manifests": {name: each.digest for name, each in manifests.items()}}
    try:
        claim_folder(target, target / RECORDS_NAME, inputs)
        with part_lock(part, target / RECORDS_NAME):
            tasks = {name: clip_tasks(name, each, target, settings) for name, each in manifests.items()}
            ours = [(task, manifests[name].row(task.number)) for name in tasks for task in part.of(tasks[name])]
            waiting = [task for task, row in ours if find_row(task, row) is None and find_reason(task) is None]
            failed = {}
            for task, reason in progress(_encoded(waiting, workers), len(waiting), "transcode"):
                if reason:
                    failed[task] = reason
            return _finish(target, manifests, tasks, failed, len(waiting), max_bad)
    except OSError as error:
        raise DataSetError(cannot_write(error.filename or target, error, "--to")) from error


def _refuse_flow(manifests: dict[str, Manifest]) -> None:
    """Raise DataSetError for clips of optical flow, whose values must not change as those of an image may."""
    for manifest in manifests.values():
        if FLOW in manifest.modalities():
            raise DataSetError(
                f"{manifest.path}: its clips are optical flow, which is not transcoded. "
                "Fix: transcode the frames, and compute the flow of the result"
            )


def clip_tasks(name: str, manifest: Manifest, target: Path, settings: Settings) -> list[ClipTask]:
    """List a task for each row. Clips are named by row number, a thousand per folder."""
    return [
        ClipTask(manifest.path, number, target, f"{name}/{number // _CLIPS_IN_FOLDER:06d}/{number:09d}", settings)
        for number in range(len(manifest))
    ]


def _encoded(tasks: list[ClipTask], workers: int) -> Iterator[tuple[ClipTask, str]]:
    """Yield each finished task, with the reason if its clip is bad."""
    with closing(run_guarded(transcode_clip, tasks, workers, "encoding", _name)) as results:
        for number, result in results:
            if isinstance(result, Died):
                yield tasks[number], result.reason
                continue
            if result.fatal:
                raise DataSetError(result.fatal)
            yield tasks[number], result.bad


def _name(task: ClipTask) -> str:
    return f"{task.manifest}, row {task.number},"


def _finish(
    target: Path,
    manifests: dict[str, Manifest],
    tasks: dict[str, list[ClipTask]],
    failed: dict[ClipTask, str],
    new: int,
    max_bad: float,
) -> Transcoded:
    """Write the manifests if every clip is finished or has a reason why it is left out."""
    with records_lock(target / RECORDS_NAME):
        done = Transcoded(new, 0)
        rows = {name: _collect(name, manifest, tasks[name], failed, done) for name, manifest in manifests.items()}
        if done.missing:
            return Transcoded(new, done.missing)
        write_bad_files(target / BAD_FILES_NAME, done.splits)
        for name, report in done.splits.items():
            refuse_bad(target, name, report, max_bad, 0.0)
        for name, manifest in manifests.items():
            path = target / f"{name}.arrow"
            write_manifest(path, rows[name], manifest.classes, manifest.order_groups, manifest.split)
    return done


def _collect(
    name: str, manifest: Manifest, tasks: list[ClipTask], failed: dict[ClipTask, str], done: Transcoded
) -> list[ManifestRow]:
    """Return the new rows of a split; add its report and sizes to `done`, and count the missing clips there."""
    report, rows, before = SplitReport(listed=len(manifest)), [], 0
    for task in tasks:
        source = manifest.row(task.number)
        row = find_row(task, source)
        if row is not None:
            rows.append(replace(row, name=clip_name(source)))
            before += source.length
        elif (reason := failed.get(task) or find_reason(task)) is not None:
            report.bad.append((source.path, reason))
        else:
            done.missing += 1
    report.written = len(rows)
    done.splits[name] = report
    done.bytes_before[name], done.bytes_after[name] = before, sum(row.length for row in rows)
    return rows

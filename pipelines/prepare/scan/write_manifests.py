"""Write manifests from annotations: decode every clip once, in parallel; leave out and list those that do not decode."""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

from pipelines.errors import BadClip, MissingClip
from pipelines.jpeg_clips import IMAGES_PER_FRAME, JPEG_FRAMES, modality_of
from pipelines.manifest import Manifest, ManifestError, ManifestRow, write_manifest
from pipelines.prepare.annotations.base import Annotations, Clip, check_annotations
from pipelines.prepare.annotations.file_identity import real_folder, real_path
from pipelines.prepare.errors import DataSetError, cannot_write
from pipelines.prepare.progress import progress
from pipelines.prepare.split_report import BAD_FILES_NAME, SplitReport, check_fraction, refuse_bad, write_bad_files
from pipelines.prepare.worker_pool import Died, run_guarded

from .flow_folders import scan_flow, stat_flow
from .frame_folders import scan_frames, stat_frames
from .scan_clip import check_regular, scan_clip
from .scan_journal import Scanned, open_journal
from .seek_check import fast_decoder_loads

JOURNAL_NAME, FLOW_JOURNAL_NAME = "scan.jsonl", "scan-{}.jsonl"


def write_manifests(
    root: Path, annotations: Annotations, workers: int, max_bad: float = 0.05, max_missing: float = 0.0
) -> dict[str, SplitReport]:
    """Scan every clip, write `root/SPLIT.arrow` in the order of the annotations, and `root/bad_files.csv`.

    Raises DataSetError, and writes no manifest, when a larger fraction of a split than `max_bad` or `max_missing` is unusable.
    """
    check_fraction("--max-bad", max_bad)
    check_fraction("--max-missing", max_missing)
    if workers < 0:
        raise DataSetError(f"--workers is {workers}. Fix: give 0 (scan in this process) or more")
    check_annotations(annotations)
    _require_modality(root, annotations)
    try:
        scanned, unchanged = _scan_all(root, annotations, workers)
        reports = {}
        rows = {}
        for split, clips in annotations.splits.items():
            paths = [row_path(root, clip.path) for clip in clips]
            reports[split], rows[split] = _collect(clips, paths, scanned)
            reports[split].unchanged = sum(path in unchanged for path in paths)
        write_bad_files(root / BAD_FILES_NAME, reports)
        for split, report in reports.items():
            refuse_bad(root, split, report, max_bad, max_missing)
        for split, split_rows in rows.items():
            write_manifest(root / f"{split}.arrow", split_rows, annotations.classes, split=split)
    except OSError as error:
        raise DataSetError(cannot_write(error.filename or root, error, "--root")) from error
    return reports


def _require_modality(root: Path, annotations: Annotations) -> None:
    """Raise DataSetError if manifests of another modality would be replaced."""
    modality = modality_of(annotations.images)
    for split in annotations.splits:
        path = root / f"{split}.arrow"
        try:
            found = Manifest.open(path).modalities()
        except ManifestError:
            continue
        if found != {modality}:
            raise DataSetError(
                f"{path} has clips of {' and '.join(sorted(found))}, and the new one would have clips of {modality}. "
                "Fix: give another folder for the manifests with --root, and the folder of the clips with --videos"
            )


def row_path(root: Path, path: Path) -> str:
    """Return a clip's path for the manifest in `root`, chosen so that clips and manifest can be moved together.

    Below the manifest's folder it is relative. Elsewhere it is relative with `..` when the two share more than the file
    system's root (with symbolic links resolved, because `..` after a link leads elsewhere), otherwise absolute.
    """
    lexical, lexical_root = (Path(os.path.normpath(each.absolute())) for each in (path, root))
    if lexical.is_relative_to(lexical_root):
        return str(lexical.relative_to(lexical_root))
    real, real_root = real_path(lexical), real_folder(lexical_root)
    return str(real) if os.path.commonpath([real, real_root]) == os.sep else os.path.relpath(real, real_root)


def _scan_all(root: Path, annotations: Annotations, workers: int) -> tuple[dict[str, Scanned], set[str]]:
    """Return the record of every clip by its manifest path, and the paths whose records come from an earlier scan."""
    paths = dict.fromkeys(row_path(root, clip.path) for clips in annotations.splits.values() for clip in clips)
    scanned, unchanged = {}, set()
    images = annotations.images
    name = JOURNAL_NAME if images == JPEG_FRAMES else FLOW_JOURNAL_NAME.format(images)
    with open_journal(root / name) as (known, journal):
        tasks = [(root, path, known.get(path)) for path in paths]
        for result in progress(scan_each(tasks, workers, images), len(tasks), "scan"):
            scanned[result.path] = result
            if result == known.get(result.path):
                unchanged.add(result.path)
            else:
                journal.add(result)
    return scanned, unchanged


Task = tuple[Path, str, Scanned | None]
"""(folder of the manifests, path in the manifest, record of an earlier scan)."""


def scan_each(tasks: Sequence[Task], workers: int, images: str = JPEG_FRAMES) -> Iterator[Scanned]:
    """Scan the clips, and yield their records in order of completion. With `workers` a decoder's crash makes a bad clip."""
    scan = scan_one if images == JPEG_FRAMES else partial(scan_one, images=images)
    with closing(run_guarded(scan, tasks, workers, "scanning", _name)) as results:
        for index, result in results:
            if isinstance(result, Died):
                # Without size and time it is not written to the journal, so the next scan tries again.
                result = Scanned(tasks[index][1], 0, 0, reason=f"{_name(tasks[index])}: {result.reason}")
            yield result


def _name(task: Task) -> str:
    root, path, _ = task
    return str(root / path)


def scan_one(task: Task, images: str = JPEG_FRAMES) -> Scanned:
    """Decode one clip, a file or a folder of images; return `known` if it has not changed since.

    `images`: the codec of folders; a codec of optical flow accepts only folders.
    """
    root, path, known = task
    full_path = root / path
    size, mtime_ns = 0, 0
    try:
        if not path.isascii():
            _require_utf8(path)
        is_folder = full_path.is_dir()
        if is_folder:
            size, mtime_ns = stat_frames(full_path) if images == JPEG_FRAMES else stat_flow(full_path, images)
        else:
            try:
                status = os.stat(full_path)
            except (FileNotFoundError, NotADirectoryError):
                raise MissingClip(f"{full_path}: no such file") from None
            size, mtime_ns = status.st_size, status.st_mtime_ns
        if known is not None and (known.size, known.mtime_ns) == (size, mtime_ns) and not _must_check_seek(known):
            return known
        if not is_folder:
            check_regular(full_path, status.st_mode)
            if images != JPEG_FRAMES:
                raise BadClip(f"{full_path}: a file, and not a folder of optical flow")
            # Missing permission says nothing about the content, so it must raise here, outside of scan_clip.
            open(full_path, "rb").close()
            return Scanned(path, size, mtime_ns, scan_clip(full_path))
        series, facts = scan_frames(full_path) if images == JPEG_FRAMES else scan_flow(full_path, images)
        return Scanned(path, size, mtime_ns, facts, pattern=series.pattern, first=series.first)
    except BadClip as error:
        return Scanned(path, size, mtime_ns, reason=str(error), missing=isinstance(error, MissingClip))
    # A permission or disk error can be fixed without changing the file, so no size and time are recorded.
    except OSError as error:
        return Scanned(path, 0, 0, reason=f"{full_path}: {error.strerror}")


def _must_check_seek(known: Scanned) -> bool:
    """Tell whether a video was scanned where torchcodec did not load, and can be compared now."""
    facts = known.facts
    if facts is None or facts.codec in IMAGES_PER_FRAME:
        return False
    return facts.fast_seek is None and fast_decoder_loads()


def _require_utf8(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise BadClip(f"{path!r}: its name is not UTF-8. Fix: rename it") from None


def _collect(clips: list[Clip], paths: list[str], scanned: dict[str, Scanned]) -> tuple[SplitReport, list[ManifestRow]]:
    """Return the report of a split, and the rows of its good clips."""
    report, rows = SplitReport(listed=len(clips)), []
    for clip, path in zip(clips, paths, strict=True):
        found = scanned[path]
        if found.facts is None:
            (report.missing if found.missing else report.bad).append((path, found.reason))
            continue
        report.codecs[found.facts.codec] += 1
        if found.facts.codec not in IMAGES_PER_FRAME:
            report.not_fast += found.facts.fast_seek is False
            report.not_tried += found.facts.fast_seek is None
        # Lists of flow with an image each for x and y may give the number of images, as the official ones do.
        count = found.facts.num_frames
        if clip.listed_frames not in (None, count, count * IMAGES_PER_FRAME.get(found.facts.codec, 1)):
            report.miscounted.append(f"{clip.where}: {clip.listed_frames} frames listed, but {path} has {count}")
        rows.append(row_of(found, clip.label))
    report.written = len(rows)
    return report, rows


def row_of(found: Scanned, label: int) -> ManifestRow:
    """Return the manifest row of a good clip."""
    assert found.facts is not None
    path = f"{found.path}/{found.pattern}" if found.pattern else found.path
    return ManifestRow(path, found.first, label=label, **asdict(found.facts))

"""Refuse clips that training shares with an evaluation under another name, and note those that one split holds twice."""

import csv
import hashlib
import io
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pipelines.prepare.errors import DataSetError, cannot_write
from pipelines.prepare.progress import progress
from runtime.atomic_write import atomic_write

from .base import Annotations, Clip
from .file_identity import file_id, first_three

SAME_FILES_NAME = "same_files.csv"

# Threads that wait for the file system.
_THREADS = 16

Result = TypeVar("Result")
Pair = tuple[Clip, Clip]


def check_same_files(root: Path, annotations: Annotations, by_content: bool = False) -> list[str]:
    """Compare the clips' files by device and inode, or by their bytes; returns notes on files that a split lists twice.

    Raises DataSetError if training and validation, or training and test, share a file; `root/same_files.csv` then lists them.
    `by_content`: also read videos of equal size, and compare their sha256. Folders of frames are compared by inode.
    """
    paths = list(dict.fromkeys(clip.path for clips in annotations.splits.values() for clip in clips))
    ids: dict[Path, Hashable] = dict(_threaded(file_id, paths))
    what = "file"
    if by_content:
        ids |= _digests(paths)
        what = "content"
    groups = {split: _grouped(clips, ids) for split, clips in annotations.splits.items()}
    train = groups.get("train", {})
    shared = [
        (split, (clip, train[key][0]))
        for split in groups
        if split != "train"
        for key, clips in groups[split].items()
        if key in train
        for clip in clips
    ]
    if shared:
        _write(root / SAME_FILES_NAME, shared)
        names = [f"{clip.path} ({split}) = {other.path}" for split, (clip, other) in shared]
        raise DataSetError(
            f"training and evaluation share the {what} of {len(shared)} clips: {first_three(names)}. "
            f"All: {root / SAME_FILES_NAME}. Fix: remove each from one of its splits"
        )
    return [note for split in groups for note in _notes(split, groups[split], what)]


def _grouped(clips: Iterable[Clip], ids: dict[Path, Hashable]) -> dict[Hashable, list[Clip]]:
    groups = defaultdict(list)
    for clip in clips:
        # The scan reports clips that are missing.
        if ids[clip.path] is not None:
            groups[ids[clip.path]].append(clip)
    return groups


def _notes(split: str, groups: dict[Hashable, list[Clip]], what: str) -> Iterator[str]:
    pairs = [(clip, clips[0]) for clips in groups.values() for clip in clips[1:]]
    if pairs:
        other_label = sum(clip.label != first.label for clip, first in pairs)
        labels = f", {other_label} with another label" if other_label else ""
        names = [f"{clip.path} = {first.path}" for clip, first in pairs]
        yield f"NOTE: {len(pairs)} {split} clips repeat the {what} of an earlier one{labels}: {first_three(names)}"


def _digests(paths: list[Path]) -> dict[Path, Hashable]:
    """Return the sha256 of each regular file that has the size of another; names of one file count as one."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path, size in _threaded(_size, paths):
        if size:
            by_size[size].append(path)
    alike = [path for group in by_size.values() if len(group) > 1 for path in group]
    digests = progress(_threaded(_sha256, alike), len(alike), "compare", "file") if alike else ()
    return {path: digest for path, digest in digests if digest is not None}


def _size(path: Path) -> int:
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _sha256(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    # The scan reports it.
    except OSError:
        return None


def _threaded(function: Callable[[Path], Result], paths: list[Path]) -> Iterator[tuple[Path, Result]]:
    """Yield each path with the function's result, in order."""
    with ThreadPoolExecutor(_THREADS) as threads:
        yield from zip(paths, threads.map(function, paths), strict=True)


def _write(path: Path, shared: list[tuple[str, Pair]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["split", "path", "listed by", "training path", "listed by"])
    for split, (clip, other) in shared:
        writer.writerow([split, clip.path, clip.where, other.path, other.where])
    # Names that are not UTF-8 keep their bytes.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(text.getvalue().encode(errors="surrogateescape"))
    except OSError as error:
        raise DataSetError(cannot_write(path, error, "--root")) from error

"""Stage a data set on a node's local disk: copy all files, selected ones, or as many as fit.

Training reads a staged file if there is one (pipelines/decoding/staged_copies.py), otherwise the shared file system. A shard's
digest (`shards.json`) is checked while it is copied; of other files only the length is known.
"""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.decoding.staged_copies import copy_path
from pipelines.manifest import Manifest, ManifestRow, image_file, in_shard
from pipelines.prepare.errors import DataSetError, cannot_write
from pipelines.prepare.progress import progress
from pipelines.prepare.worker_pool import Died, run_guarded
from pipelines.stream.order import StreamOrder
from runtime.atomic_write import atomic_write
from runtime.private_folder import check_private

from .open_manifests import open_manifests
from .shard_index import INDEX_NAME, ShardFacts, read_shard_index

_READ_BYTES = 1 << 22
# A file takes whole blocks of the disk.
_DISK_BLOCK_BYTES = 4096
# Fraction of the disk left for the ranks' logs.
_LEFT_FREE = 0.01


@dataclass(frozen=True)
class Steps:
    """Steps of a run, to stage only their training clips."""

    first: int
    count: int
    global_batch: int
    seed: int


@dataclass(frozen=True)
class CopyTask:
    """A shard, a video, or all images of a clip, in their order."""

    sources: tuple[Path, ...]
    targets: tuple[Path, ...]
    size_bytes: int
    sha256: str | None


@dataclass
class Staged:
    """The result of `stage`; a file is a shard, a video or a folder of frames."""

    wanted: int
    copied: int = 0
    present: int = 0
    """Complete from an earlier call."""
    left: int = 0
    """Not copied, because they did not fit."""
    copied_bytes: int = 0
    bad: list[str] = field(default_factory=list)
    """One text per file that could not be copied, with the reason."""


def parse_range(text: str) -> slice:
    """Parse `0:100`, `:100` or `100:` to a slice. Raises ValueError for anything else."""
    first, colon, last = text.partition(":")
    if not colon or not all(part.isdigit() or not part for part in (first, last)):
        raise ValueError(f"{text!r} is no range. Fix: give two numbers like 0:100")
    return slice(int(first) if first else None, int(last) if last else None)


def stage(root: Path, target: Path, workers: int, shards: slice | None, steps: Steps | None) -> Staged:
    """Copy the wanted files of the data set in `root` to `target`, as many as fit, in the order of their use.

    Raises DataSetError for wrong options. A file that cannot be copied is no error: training reads the shared one.
    """
    manifests = open_manifests(root)
    tasks = list(_tasks(root, target, manifests, shards, steps))
    staged = Staged(len(tasks))
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_target(target)
        chosen = list(_fitting(target, tasks, staged))
    except OSError as error:
        raise DataSetError(cannot_write(target, error, "--to")) from error
    results = _copied(chosen, workers)
    # No progress in a job's log, which a thousand nodes write to.
    if sys.stderr.isatty():
        results = progress(results, len(chosen), "stage", "file")
    for task, reason in results:
        if not reason:
            staged.copied += 1
            staged.copied_bytes += task.size_bytes
        else:
            staged.bad.append(reason)
    return staged


def _check_target(target: Path) -> None:
    """Raise DataSetError if another user could change what training reads, or make links here that a copy would follow."""
    try:
        check_private(target)
    except PermissionError as error:
        raise DataSetError(
            f"--to: {target} {error.strerror}. Fix: give a folder that only you can write to, for example a new one"
        ) from error


def _tasks(
    root: Path, target: Path, manifests: dict[str, Manifest], shards: slice | None, steps: Steps | None
) -> Iterator[CopyTask]:
    """Yield a task for each wanted file, once, in the order of use."""
    index = read_shard_index(root)
    facts = {} if index is None else index.shards
    if shards is not None:
        if not facts:
            raise DataSetError(
                f"--shards: {root} has no {INDEX_NAME}, so no shards to choose from. Fix: leave out --shards"
            )
        for name in list(facts)[shards]:
            yield _shard_task(root, target, name, facts)
        return
    seen: set[str] = set()
    for manifest, row in _wanted_rows(manifests, steps):
        if row.path in seen:
            continue
        seen.add(row.path)
        if in_shard(row):
            yield _shard_task(manifest.root, target, row.path, facts)
        else:
            yield _file_task(manifest.root, target, row)


def _wanted_rows(manifests: dict[str, Manifest], steps: Steps | None) -> Iterator[tuple[Manifest, ManifestRow]]:
    """Yield all rows, training clips first, or only the rows of some steps, in their order."""
    if steps is None:
        for name in sorted(manifests, key=lambda name: (name != "train", name)):
            for number in range(len(manifests[name])):
                yield manifests[name], manifests[name].row(number)
        return
    if "train" not in manifests:
        raise DataSetError("--steps: the data set has no train.arrow. Fix: leave out --steps")
    train = manifests["train"]
    positions = np.arange(steps.first * steps.global_batch, (steps.first + steps.count) * steps.global_batch)
    _, row_N = StreamOrder(len(train), steps.seed).at(positions)
    for number in dict.fromkeys(row_N.tolist()):
        yield train, train.row(number)


def _shard_task(root: Path, target: Path, path: str, facts: dict[str, ShardFacts]) -> CopyTask:
    source = root / path
    known = facts.get(path)
    try:
        size = known.bytes if known is not None else source.stat().st_size
    except OSError as error:
        raise DataSetError(f"{source}: {error.strerror}. Fix: restore it, or make the shards again") from error
    return CopyTask((source,), (copy_path(target, root, path),), size, known.sha256 if known is not None else None)


def _file_task(root: Path, target: Path, row: ManifestRow) -> CopyTask:
    source, copy = root / row.path, copy_path(target, root, row.path)
    if not row.is_images:
        return CopyTask((source,), (copy,), row.length, None)
    images = range(row.num_images)
    sources, targets = (tuple(image_file(path, row, image) for image in images) for path in (source, copy))
    return CopyTask(sources, targets, row.length, None)


def _fitting(target: Path, tasks: Iterable[CopyTask], staged: Staged) -> Iterator[CopyTask]:
    """Yield the tasks that fit, in order; count in `staged` the files present already and those that do not fit."""
    usage = shutil.disk_usage(target)
    free = usage.free - _LEFT_FREE * usage.total
    for task in tasks:
        if _is_complete(task):
            staged.present += 1
            continue
        taken = task.size_bytes + _DISK_BLOCK_BYTES * len(task.targets)
        if taken > free:
            staged.left += 1
        else:
            free -= taken
            yield task


def _is_complete(task: CopyTask) -> bool:
    """Return whether the files exist with the right size, which is enough.

    A file gets its final name only after it was checked, and no other user can write in the folder.
    """
    try:
        return sum(os.stat(path).st_size for path in task.targets) == task.size_bytes
    except OSError:
        return False


def _copied(tasks: Sequence[CopyTask], workers: int) -> Iterator[tuple[CopyTask, str]]:
    """Copy the files, and yield each task with the reason if it failed."""
    with closing(run_guarded(copy_files, tasks, workers, "copying", _name)) as results:
        for number, result in results:
            if isinstance(result, Died):
                result = f"{_name(tasks[number])}: {result.reason}"
            yield tasks[number], result


def _name(task: CopyTask) -> str:
    return str(task.sources[0])


def copy_files(task: CopyTask) -> str:
    """Copy and check a task's files. Returns the reason if that fails, or ""."""
    sha256, size = hashlib.sha256(), 0
    try:
        for source, target in zip(task.sources, task.targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(source, "rb", buffering=0) as file, atomic_write(target, durable=False) as copy:
                while content := file.read(_READ_BYTES):
                    copy.write(content)
                    sha256.update(content)
                    size += len(content)
                if target == task.targets[-1] and (reason := _mismatch(task, size, sha256.hexdigest())):
                    raise _MismatchError(reason)
    except _MismatchError as error:
        return f"{task.sources[0]}: {error}"
    except OSError as error:
        full = error.errno == errno.ENOSPC
        return f"{task.sources[0]}: cannot copy it: {'the disk is full' if full else error.strerror or error}"
    return ""


class _MismatchError(Exception):
    """A copied file that differs from its manifest row or its shard's digest."""


def _mismatch(task: CopyTask, size: int, sha256: str) -> str:
    if size != task.size_bytes:
        return f"{size} bytes, but {task.size_bytes} when its manifest was made"
    if task.sha256 not in (None, sha256):
        return f"its sha256 differs from that in {INDEX_NAME}"
    return ""

"""Pack a data set's clips into shards: plain tar files of similar size, in the manifests' order.

Each shard is a separate task, determined only by the manifest, so any number of processes on any number of machines can share
the work, and an interrupted call resumes with the missing shards. The process that finds all shards complete writes the
manifests, then the index. The same clips give the same bytes, so a lost or damaged shard can be made again.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.clip_names import clip_name
from pipelines.decoding.tar import member_space
from pipelines.manifest import Manifest, ManifestError, ManifestRow, write_manifest
from pipelines.prepare.errors import DataSetError, cannot_write
from pipelines.prepare.progress import progress
from pipelines.prepare.worker_pool import Died, run_guarded

from .job_array import Part
from .open_manifests import open_manifests, require_other_folder
from .shard_file import ShardRecord, ShardTask, find_record, write_shard
from .shard_index import ShardFacts, ShardIndex, read_shard_index, write_shard_index
from .target_folder import claim_folder, records_lock

RECORDS_NAME = ".sharding"
"""Folder of the records of finished shards, from which a later call makes the manifests."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Sharded:
    """The result of `write_shards`."""

    new: int
    missing: int
    """Shards that other parts have yet to write; 0 when the data set is complete."""
    index: ShardIndex | None
    """None until the data set is complete."""


def parse_bytes(text: str) -> int:
    """Parse a size like `1GB` or `950 MiB` to bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)?", text.strip().upper())
    if not match or (match[2] or "") not in _UNITS or not float(match[1]):
        raise ValueError(f"{text!r} is no size. Fix: give a number of bytes, or a number with a unit, like 1GB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def write_shards(root: Path, target: Path, shard_bytes: int, workers: int, part: Part) -> Sharded:
    """Write this part's shards of the data set in `root`; once all shards exist, also the manifests and the index.

    Raises DataSetError, which names the file, for a source that cannot be read and a target that cannot be written.
    """
    require_other_folder(root, target)
    manifests = open_manifests(root)
    inputs = {"shard_bytes": shard_bytes, "manifests": {name: each.digest for name, each in manifests.items()}}
    try:
        claim_folder(target, target / RECORDS_NAME, inputs)
        tasks = [task for name, each in manifests.items() for task in shard_tasks(name, each, target, shard_bytes)]
        waiting = [task for task in part.of(tasks) if find_record(task) is None]
        _require_space(target, sum(task.size_bytes for task in waiting))
        for _ in progress(_written(waiting, workers), len(waiting), "shard", "shard"):
            pass
        return _finish(target, manifests, tasks, len(waiting))
    except OSError as error:
        raise DataSetError(cannot_write(error.filename or target, error, "--to")) from error


def shard_tasks(name: str, manifest: Manifest, target: Path, shard_bytes: int) -> list[ShardTask]:
    """Group consecutive rows into shards of at most `shard_bytes`; a larger clip gets a shard of its own."""
    tasks: list[ShardTask] = []
    first, size = 0, 0
    rows = len(manifest)
    for number in range(rows + 1):
        space = _space(manifest.row(number)) if number < rows else 0
        if number == rows or (number > first and size + space > shard_bytes):
            shard = f"{name}-{len(tasks):06d}"
            tasks.append(ShardTask(manifest.path, target, target / RECORDS_NAME, shard, first, number, size))
            first, size = number, 0
        size += space
    return tasks


def _space(row: ManifestRow) -> int:
    """Estimate a clip's bytes in a shard. It is no exact size, because the row has no size of each image."""
    overhead = row.num_images * member_space(16) if row.is_images else 0
    return member_space(row.length) + overhead + member_space(1)


def _require_space(target: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(target).free
    if free_bytes < needed_bytes:
        raise DataSetError(
            f"{target}: {needed_bytes / 1e9:.3g} GB to write, but {free_bytes / 1e9:.3g} GB free. Fix: free space there, or "
            "choose another folder with --to"
        )


def _written(tasks: list[ShardTask], workers: int) -> Iterator[ShardTask]:
    """Write the shards, and yield each finished task."""
    with closing(run_guarded(write_shard, tasks, workers, "writing", _name)) as results:
        for number, result in results:
            if isinstance(result, Died):
                fix = "Fix: run the same command again with fewer --workers"
                result = f"{_name(tasks[number])}: {result.reason}. {fix}"
            if result:
                raise DataSetError(result)
            yield tasks[number]


def _name(task: ShardTask) -> str:
    return str(task.path)


def _finish(target: Path, manifests: dict[str, Manifest], tasks: list[ShardTask], new: int) -> Sharded:
    """Write the manifests and the index if all shards exist."""
    with records_lock(target / RECORDS_NAME):
        records = {task.name: find_record(task) for task in tasks}
        missing = sum(record is None for record in records.values())
        if missing:
            return Sharded(new, missing, None)
        index = read_shard_index(target)
        if new == 0 and index is not None and _is_current(target, manifests):
            return Sharded(0, 0, index)
        found = [(task, record) for task in tasks if (record := records[task.name]) is not None]
        digests = {}
        for name, manifest in manifests.items():
            rows = _rows(manifest, [(task, record) for task, record in found if task.manifest == manifest.path])
            path = target / f"{name}.arrow"
            digests[path.name] = write_manifest(path, rows, manifest.classes, manifest.order_groups, manifest.split)
        shards = {task.path.name: ShardFacts(record.bytes, record.sha256) for task, record in found}
        index = ShardIndex(digests, shards)
        write_shard_index(target, index)
        return Sharded(new, 0, index)


def _is_current(target: Path, manifests: dict[str, Manifest]) -> bool:
    """Tell whether the shards' manifests name the clips, and say how to decode them as the source's do, which may be newer.

    A missing or damaged one, or one of an older version, does not, so the same command writes it again.
    """
    try:
        written = {name: Manifest.open(target / f"{name}.arrow") for name in manifests}
    except ManifestError:
        return False
    return all(
        written[name].is_as_written() and written[name].decodes_as(manifest) and not written[name].rows_of(1, name="")
        for name, manifest in manifests.items()
    )


def _rows(manifest: Manifest, shards: list[tuple[ShardTask, ShardRecord]]) -> Iterator[ManifestRow]:
    """Yield the rows of a manifest with their places in the shards."""
    for task, record in shards:
        for number, offset, length in zip(range(task.first, task.last), record.offsets, record.lengths, strict=True):
            row = manifest.row(number)
            yield replace(row, path=task.path.name, offset=offset, length=length, name=clip_name(row))

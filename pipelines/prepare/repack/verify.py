"""Verify a data set against its manifests: every shard's sha256, every clip's offset and length; optionally every frame."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipelines.decoding.clip_bytes import check_clip, encoded_video, image_bytes
from pipelines.decoding.shard_reader import close_shards
from pipelines.errors import BadClip
from pipelines.manifest import Manifest, ManifestRow, in_shard
from pipelines.prepare.progress import progress
from pipelines.prepare.scan.scan_clip import scan_video
from pipelines.prepare.worker_pool import Died, run_guarded

from .open_manifests import open_cached, open_manifests
from .shard_index import INDEX_NAME, ShardFacts, ShardIndex, read_shard_index

_ROWS_PER_TASK = 500
_READ_BYTES = 1 << 22
_FIX_SHARD = "Fix: remove it, and run the same prepare.py shard command again"


@dataclass(frozen=True)
class Verified:
    """The result of `verify`."""

    clips: int
    shards: int
    bad: list[str]
    """One text per fault, with its file."""


@dataclass(frozen=True)
class ShardCheck:
    """A task: compare a shard with the index."""

    path: Path
    facts: ShardFacts


@dataclass(frozen=True)
class RowsCheck:
    """A task: check rows `first` to `last` (exclusive) of a manifest."""

    manifest: Path
    first: int
    last: int
    decode: bool


def verify(root: Path, workers: int, decode: bool) -> Verified:
    """Check every shard and every clip of the manifests in `root`. Raises DataSetError if there is no manifest."""
    manifests, index = open_manifests(root, checked=False), read_shard_index(root)
    bad = [
        f"{each.path}: its rows do not match its digest. Fix: make the manifest again"
        for each in manifests.values()
        if not each.is_as_written()
    ]
    bad += _check_index(root, manifests, index)
    shards = {} if index is None else index.shards
    tasks: list[ShardCheck | RowsCheck] = [ShardCheck(root / name, facts) for name, facts in shards.items()]
    # With decoding one row per task, so that a crash of the decoder names its clip.
    step = 1 if decode else _ROWS_PER_TASK
    for manifest in manifests.values():
        for first in range(0, len(manifest), step):
            tasks.append(RowsCheck(manifest.path, first, min(first + step, len(manifest)), decode))
    for found in progress(_checked(tasks, workers), len(tasks), "verify", "check"):
        bad += found
    return Verified(sum(map(len, manifests.values())), len(shards), bad)


def _check_index(root: Path, manifests: dict[str, Manifest], index: ShardIndex | None) -> list[str]:
    """Compare the manifests with the index; return the faults."""
    fix = "Fix: run the same prepare.py shard command again"
    if index is None:
        in_shards = any(in_shard(manifest.row(0)) for manifest in manifests.values())
        return [f"{root / INDEX_NAME} is missing, so no shard's sha256 is known. {fix}"] if in_shards else []
    bad = [f"{root / name} is missing. {fix}" for name in index.manifests if Path(name).stem not in manifests]
    for name, manifest in manifests.items():
        expected = index.manifests.get(manifest.path.name)
        if expected != manifest.digest:
            bad.append(
                f"{root / name}.arrow has another digest than in {INDEX_NAME}: the shards belong to another manifest"
            )
    return bad


def _checked(tasks: list[ShardCheck | RowsCheck], workers: int) -> Iterator[list[str]]:
    """Do the tasks, and yield the faults of each."""
    with closing(run_guarded(check, tasks, workers, "verifying", _name)) as results:
        for number, result in results:
            if isinstance(result, Died):
                result = [f"{_name(tasks[number])}: {result.reason}"]
            yield result


def _name(task: ShardCheck | RowsCheck) -> str:
    return str(task.path) if isinstance(task, ShardCheck) else f"{task.manifest}, rows from {task.first}"


def check(task: ShardCheck | RowsCheck) -> list[str]:
    """Do one task; return the faults."""
    if isinstance(task, ShardCheck):
        return _check_shard(task)
    manifest, bad = open_cached(task.manifest), []
    for number in range(task.first, task.last):
        row = manifest.row(number)
        try:
            check_clip(manifest.root, row)
            if task.decode:
                _decode(manifest.root, row)
        except BadClip as error:
            bad.append(f"{task.manifest}, row {number}: {error}")
    close_shards()
    return bad


def _check_shard(task: ShardCheck) -> list[str]:
    sha256, size = hashlib.sha256(), 0
    try:
        with open(task.path, "rb", buffering=0) as file:
            while content := file.read(_READ_BYTES):
                sha256.update(content)
                size += len(content)
    except OSError as error:
        return [f"{task.path}: {error.strerror}. {_FIX_SHARD}"]
    if size != task.facts.bytes:
        return [f"{task.path}: {size} bytes, but {task.facts.bytes} in {INDEX_NAME}. {_FIX_SHARD}"]
    if sha256.hexdigest() != task.facts.sha256:
        return [f"{task.path}: its sha256 differs from that in {INDEX_NAME}. {_FIX_SHARD}"]
    return []


def _decode(root: Path, row: ManifestRow) -> None:
    """Raise BadClip unless every frame decodes and the clip matches its row."""
    if row.is_images:
        _decode_images(root, row)
        return
    video = encoded_video(root, row)
    facts = scan_video(video, row.length, ours=True)
    for name in ("num_frames", "codec", "width", "height", "rotation", "mirrored"):
        found, expected = getattr(facts, name), getattr(row, name)
        if found != expected:
            raise BadClip(f"{video.name}: {name} is {found}, but {expected} when the manifest was made")
    if row.fast_seek and not facts.fast_seek:
        raise BadClip(f"{video.name}: its packets have other times than when the manifest was made")


def _decode_images(root: Path, row: ManifestRow) -> None:
    # Imported here because it loads torch, which the other checks do not need.
    from pipelines.decoding.jpeg import check_image_size, decode_jpeg_bytes

    for number in range(row.num_images):
        name, content = image_bytes(root, row, number)
        height, width = decode_jpeg_bytes(name, content).shape[1:]
        check_image_size(name, width, height, row)

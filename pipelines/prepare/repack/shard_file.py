"""Write one shard atomically, and next to it a record of each clip's offset and length."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipelines.decoding.clip_bytes import encoded_video, image_bytes, read_video
from pipelines.decoding.shard_reader import INDEX_DTYPE, close_shards
from pipelines.decoding.tar import TarWriter, member_space
from pipelines.errors import BadClip
from pipelines.manifest import SHARD_SUFFIX, UNLABELLED, ManifestRow, in_shard
from pipelines.prepare.errors import cannot_write
from runtime.atomic_write import atomic_write, write_text
from runtime.file_lock import file_lock

from .open_manifests import open_cached


@dataclass(frozen=True)
class ShardTask:
    """Rows `first` to `last` (exclusive) of a manifest, and the shard to write them to."""

    manifest: Path
    target: Path
    records: Path
    """Folder of the records of finished shards."""
    name: str
    first: int
    last: int
    size_bytes: int
    """Upper estimate of the shard's size, from the rows."""

    @property
    def path(self) -> Path:
        return self.target / f"{self.name}{SHARD_SUFFIX}"


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, and the offset and length of each clip in it."""

    bytes: int
    sha256: str
    offsets: list[int]
    lengths: list[int]


def find_record(task: ShardTask) -> ShardRecord | None:
    """Read a shard's record. Returns None unless the shard is finished and still has the recorded size."""
    try:
        record = ShardRecord(**json.loads(_record_path(task).read_text()))
        complete = task.path.stat().st_size == record.bytes and len(record.offsets) == task.last - task.first
        return record if complete else None
    except (OSError, ValueError, TypeError):
        return None


def write_shard(task: ShardTask) -> str:
    """Write a shard, unless it exists already or another process is writing it. Returns an error message, or ""."""
    try:
        with file_lock(task.records / f"{task.name}.lock", wait=False) as ours:
            if ours and find_record(task) is None:
                write_text(_record_path(task), json.dumps(asdict(_write(task))))
    except BadClip as error:
        return f"{error}. Fix: make the manifest again, which leaves out clips that cannot be read"
    except OSError as error:
        return cannot_write(task.path, error, "--to")
    finally:
        # Close the shards that the clips were read from.
        close_shards()
    return ""


def _record_path(task: ShardTask) -> Path:
    return task.records / f"{task.name}.json"


def _write(task: ShardTask) -> ShardRecord:
    manifest = open_cached(task.manifest)
    offsets, lengths = [], []
    with atomic_write(task.path) as file:
        writer = TarWriter(file)
        for number in range(task.first, task.last):
            row = manifest.row(number)
            add = _add_images if row.is_images else _add_video
            offset, length = add(writer, f"{number:09d}", manifest.root, row)
            if row.label != UNLABELLED:
                writer.add(f"{number:09d}.cls", str(row.label).encode())
            offsets.append(offset)
            lengths.append(length)
        sha256 = writer.finish()
    return ShardRecord(writer.size_bytes, sha256, offsets, lengths)


def _add_video(writer: TarWriter, key: str, root: Path, row: ManifestRow) -> tuple[int, int]:
    video = encoded_video(root, row)
    content = read_video(video, row).tobytes()
    return writer.add(key + (Path(video.name).suffix.lower() or ".video"), content), len(content)


def _add_images(writer: TarWriter, key: str, root: Path, row: ManifestRow) -> tuple[int, int]:
    images = [image_bytes(root, row, number)[1] for number in range(row.num_images)]
    _check_images(root, row, images)
    return add_images(writer, key, images)


def add_images(writer: TarWriter, key: str, images: list[bytes]) -> tuple[int, int]:
    """Add the index of a clip's images, then the images. Returns the clip's offset, of the index, and its length.

    The clip reaches from the index's first byte to the last image's last byte.
    """
    index = np.zeros(len(images), INDEX_DTYPE)
    place = member_space(index.nbytes)
    for number, content in enumerate(images):
        index[number] = place, len(content)
        place += member_space(len(content))
    offset = writer.add(f"{key}.index", index.tobytes())
    for number, content in enumerate(images):
        writer.add(f"{key}.{number:05d}.jpg", content)
    start, length = index[-1].tolist()
    return offset, start + length


def _check_images(root: Path, row: ManifestRow, images: list[bytes]) -> None:
    size = sum(map(len, images))
    if not in_shard(row) and size != row.length:
        raise BadClip(f"{root / row.path}: frames have {size} bytes, but had {row.length} when the manifest was made")

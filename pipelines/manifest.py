"""The list of a split's clips: one Arrow IPC file, one row per clip, memory-mapped so that all processes of a node share it.

A process's own share stays small at any length (no column is copied on opening), and `row(i)` touches one row's bytes.
The rows lie in blocks of BLOCK_ROWS; what is said once (classes, split, digest) is JSON in the schema's metadata.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from runtime.atomic_write import atomic_write

VERSION = 1
BLOCK_ROWS = 1 << 18
HINT = "prepare.py makes one"
JPEG_FRAMES = "jpeg-frames"
"""The codec of a clip that is kept as one JPEG picture for each frame."""
SHARD_SUFFIX = ".tar"
"""A row whose path ends so is of a clip in a shard."""


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the file and says what is wrong with it."""


@dataclass(frozen=True)
class ManifestRow:
    """A clip in a file of its own, in a folder of JPEG files, or in a shard: a plain tar file, whose name ends in SHARD_SUFFIX.

    In a shard a video is one member, and `offset` and `length` are those of its bytes. A clip of JPEG_FRAMES is an index
    (storage.INDEX_DTYPE) and one member for each frame, and its bytes reach from the index to the last frame.
    """

    path: str
    """Relative to the manifest's folder, or absolute. Of JPEG_FRAMES in files: the folder, and the printf pattern of the files'
    names (`20bn-something-something-v1/1/%05d.jpg`); the folder part is no pattern, a percent sign in a file's name is doubled."""
    offset: int
    """Where the clip begins in that file, in bytes. Of JPEG_FRAMES in files: the number of the first frame's file (0 or 1)."""
    length: int
    """Bytes of the clip; for a clip with a file of its own the file's size, so that fstat recognises another file. Of
    JPEG_FRAMES in files: the bytes of all frames together."""
    label: int
    num_frames: int
    """Frames that decode."""
    codec: str
    """FFmpeg's name of the decoder, or JPEG_FRAMES."""
    width: int
    height: int
    """As stored, before the rotation."""
    rotation: int
    """Degrees; only of quarter turns is there an upright frame."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) of the frames as they are shown."""
        return (self.height, self.width) if self.rotation % 180 else (self.width, self.height)


def in_shard(row: ManifestRow) -> bool:
    return row.path.endswith(SHARD_SUFFIX)


_TYPES = {
    "path": pa.string(),
    "offset": pa.int64(),
    "length": pa.int64(),
    "label": pa.int32(),
    "num_frames": pa.int32(),
    "codec": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "rotation": pa.int32(),
}
_NAMES = [field.name for field in fields(ManifestRow)]
_SCHEMA = pa.schema([pa.field(name, _TYPES[name], nullable=False) for name in _NAMES])


class Manifest:
    """A split's clips, read only. Pickles as its path: a worker process maps the same file again."""

    def __init__(self, path: Path, table: pa.Table, meta: dict[str, Any]) -> None:
        self.path = path
        self.root: Path = path.parent
        self.classes: list[str] = meta["classes"]
        self.order_groups: list[int] | None = meta["order_groups"]
        """Classes with the same number differ in the order of their frames only; None where nothing is known of that."""
        self.split: str | None = meta["split"]
        self.digest: str = meta["digest"]
        """sha256 over the classes and every row, taken when the manifest was written."""
        self._table = table
        self._blocks = table.to_batches()
        self._starts = np.cumsum([0, *(block.num_rows for block in self._blocks)])

    @classmethod
    def open(cls, path: str | Path) -> "Manifest":
        """Map the file and check it as a whole (vectorised: no row becomes a Python object)."""
        path = Path(path)
        try:
            file = pa.memory_map(str(path))
        except FileNotFoundError:
            raise ManifestError(f"{path}: no such manifest; {HINT}") from None
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read ({error})") from error
        try:
            table = pa.ipc.open_file(file).read_all()  # zero-copy: the columns point into the map
        except (pa.ArrowInvalid, OSError) as error:
            raise ManifestError(f"{path}: not an Arrow file, or cut short ({error}); {HINT}") from error
        manifest = cls(path, table, _read_meta(path, table.schema))
        manifest.validate()
        return manifest

    def __reduce__(self) -> tuple[Any, ...]:
        return Manifest.open, (self.path,)

    def __len__(self) -> int:
        return self._table.num_rows

    def row(self, index: int) -> ManifestRow:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: row {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        block, at = self._blocks[number], index - int(self._starts[number])
        return ManifestRow(*(column[at].as_py() for column in block.columns))

    def labels(self) -> np.ndarray:
        """label_N, int32 (a copy where the manifest has several blocks)."""
        return self._table.column("label").to_numpy()

    def codecs(self) -> dict[str, int]:
        """How many clips each codec has."""
        counts = pc.value_counts(self._table.column("codec"))
        return {count["values"]: count["counts"] for count in counts.to_pylist()}

    def rows_of(self, codec: str, most: int) -> list[int]:
        """The first rows of a codec, at most so many."""
        column, start = self._table.column("codec"), 0
        rows: list[int] = []
        while len(rows) < most and (row := pc.index(column, codec, start=start).as_py()) >= 0:
            rows.append(row)
            start = row + 1
        return rows

    def is_as_written(self) -> bool:
        """Whether the rows still give the digest that was taken when they were written."""
        said = {"version": VERSION, "classes": self.classes, "order_groups": self.order_groups, "split": self.split}
        return _digest(said, self._blocks) == self.digest

    def validate(self) -> None:
        _check(str(self.path), self._table, self.classes, self.order_groups)


def write_manifest(
    path: str | Path,
    rows: Iterable[ManifestRow],
    classes: Sequence[str],
    order_groups: Sequence[int] | None = None,
    split: str | None = None,
) -> str:
    """Write aside, sync and rename; what would not open is not written. Returns the digest."""
    path = Path(path)
    blocks, rows = [], iter(rows)
    while block := list(islice(rows, BLOCK_ROWS)):
        columns = []
        for name in _NAMES:
            try:
                columns.append(pa.array([getattr(row, name) for row in block], _TYPES[name]))
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                raise ManifestError(f"{path}: a row's {name} does not fit {_TYPES[name]}: {error}") from error
        blocks.append(pa.record_batch(columns, schema=_SCHEMA))
    table = pa.Table.from_batches(blocks, schema=_SCHEMA)
    names, groups = list(classes), None if order_groups is None else list(order_groups)
    _check(str(path), table, names, groups)
    said = {"version": VERSION, "classes": names, "order_groups": groups, "split": split}
    digest = _digest(said, blocks)
    schema = _SCHEMA.with_metadata({b"tsm": json.dumps({**said, "digest": digest}).encode()})

    with atomic_write(path) as file, pa.ipc.new_file(file, schema) as writer:
        for block in blocks:
            writer.write_batch(block.replace_schema_metadata(schema.metadata))
    return digest


def _digest(said: dict[str, Any], blocks: list[pa.RecordBatch]) -> str:
    """Of the values, not of Arrow's bytes, which another version of Arrow may lay out otherwise."""
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for block in blocks:
        for column in block.columns:
            if pa.types.is_string(column.type):
                digest.update(json.dumps(column.to_pylist()).encode())
            else:
                digest.update(column.to_numpy().tobytes())
    return digest.hexdigest()


def _read_meta(path: Path, schema: pa.Schema) -> dict[str, Any]:
    try:
        meta = json.loads((schema.metadata or {})[b"tsm"])
        version = meta["version"]
    except (KeyError, ValueError, TypeError):
        raise ManifestError(f"{path}: an Arrow file, but not a manifest (no 'tsm' in its metadata); {HINT}") from None
    if version != VERSION:
        raise ManifestError(f"{path}: a manifest of version {version}, and only {VERSION} is known; {HINT}")
    missing = [key for key in ("classes", "order_groups", "split", "digest") if key not in meta]
    if missing:
        raise ManifestError(f"{path}: its metadata has no {', '.join(missing)}; {HINT}")
    return meta


def _check(where: str, table: pa.Table, classes: list[str], order_groups: list[int] | None) -> None:
    found = {field.name: field.type for field in table.schema}
    if found != _TYPES or table.schema.names != _NAMES:
        wrong = [
            f"{name} is {found.get(name, 'missing')}, not {kind}"
            for name, kind in _TYPES.items()
            if found.get(name) != kind
        ]
        wrong += [f"{name} is unknown" for name in found if name not in _TYPES]
        raise ManifestError(f"{where}: wrong columns: {'; '.join(wrong) or f'the order must be {_NAMES}'}")
    if not classes or len(set(classes)) != len(classes):
        raise ManifestError(f"{where}: {len(classes)} classes with {len(set(classes))} different names")
    if order_groups is not None and len(order_groups) != len(classes):
        raise ManifestError(
            f"{where}: {len(order_groups)} order groups for {len(classes)} classes; give one number per class"
        )
    if table.num_rows == 0:
        raise ManifestError(f"{where}: has no rows; no clip was found for it")
    for name in _NAMES:
        if table.column(name).null_count:
            row = pc.index(pc.is_null(table.column(name)), True).as_py()
            raise ManifestError(f"{where}: row {row} has no {name}")

    allowed = {
        "label": (0, len(classes) - 1, f"outside of 0 to {len(classes) - 1} (there are {len(classes)} classes)"),
        "num_frames": (1, None, "below 1"),
        "offset": (0, None, "below 0"),
        "length": (1, None, "below 1"),
    }
    for name, (least, most, why) in allowed.items():
        column = table.column(name)
        range_ = pc.min_max(column).as_py()
        if range_["min"] < least or (most is not None and range_["max"] > most):
            bad = pc.less(column, least) if most is None else pc.or_(pc.less(column, least), pc.greater(column, most))
            row = pc.index(bad, True).as_py()
            path = table.column("path")[row].as_py()
            raise ManifestError(f"{where}: row {row} ({path}): {name} is {column[row].as_py()}, {why}")


def frame_file(pattern: Path, number: int) -> Path:
    """The file of a frame, from a manifest row's path and the frame's number; the folder's name is no pattern."""
    return pattern.with_name(pattern.name % number)

"""The manifest of a split: one Arrow IPC file, one row per clip, memory-mapped so that all processes of a node share it.

A process's own memory stays small at any length: opening copies no column, and `row(i)` reads one row's bytes. Rows are in
blocks of BLOCK_ROWS. The header (classes, order groups, split, digest) is JSON in the schema's metadata.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from runtime.atomic_write import atomic_write

from .jpeg_clips import COMPONENT, IMAGES_PER_FRAME, JPEG_FLOW, modality_of
from .manifest_checks import column_fault, flow_fault, value_fault
from .manifest_digest import EVIDENCE, content_digest, evidence_digest, older_digest

VERSION = 1
BLOCK_ROWS = 1 << 18
HINT = "prepare.py makes one"
UNLABELLED = -1
"""The label of every clip of a manifest without labels: of a test split whose labels were not published."""
SHARD_SUFFIX = ".tar"
"""The suffix of a row's path if the clip is in a shard."""


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the file and the fault."""


@dataclass(frozen=True)
class ManifestRow:
    """A clip in a file of its own, in a folder of JPEG files, or in a shard (a plain tar file, named *SHARD_SUFFIX).

    In a shard a video is one member, and `offset` and `length` are those of its content. A clip of JPEG images is an index
    (shard_reader.INDEX_DTYPE) and one member per image; its bytes reach from the index to the last image.
    """

    path: str
    """Relative to the manifest's folder, or absolute. For JPEG images in files: the folder and the printf pattern of the file
    names (`20bn-something-something-v1/1/%05d.jpg`), for JPEG_FLOW with COMPONENT (`1/flow_{xy}_%05d.jpg`). The folder part is
    no pattern; %% in the file name is a percent sign."""
    offset: int
    """Byte where the clip starts in that file. For JPEG images in files: the number of the first file (0 or 1)."""
    length: int
    """Bytes of the clip. For a clip with a file of its own: the file's size, so that stat reveals a replaced file. For
    JPEG images in files: the total bytes of all images."""
    label: int
    """Position of the clip's class, or UNLABELLED."""
    num_frames: int
    """Number of frames that decode; for optical flow: of flow fields, each of which has an x and a y."""
    codec: str
    """FFmpeg's name of the decoder, or a codec of jpeg_clips.py."""
    width: int
    height: int
    """As stored, before rotation."""
    rotation: int
    """Degrees counter-clockwise from stored to upright. Only quarter turns can be decoded."""
    # Manifests of older versions lack the fields from here on, which then have these values.
    colour_space: str = ""
    """FFmpeg's name of the YUV matrix of the first frame (`bt709`); `unknown`: the stream does not say; empty: not recorded."""
    colour_range: str = ""
    """FFmpeg's name of the range of the first frame's values: `tv`, `pc` or `unknown`; empty: not recorded."""
    mirrored: bool = False
    """The stored frames are to be mirrored left and right, before they are rotated."""
    fast_seek: bool | None = None
    """The scan has found that a decoder that seeks (torchcodec) gives the same frames as one that counts. None: not tried."""
    name: str = ""
    """Name of the clip (clip_names.py), if the path does not say it: in a shard, or transcoded. Empty: the path says it."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) of the upright frames."""
        return (self.height, self.width) if self.rotation % 180 else (self.width, self.height)

    @property
    def is_images(self) -> bool:
        """Tell whether the clip is stored as JPEG images; otherwise it is a video."""
        return self.codec in IMAGES_PER_FRAME

    @property
    def num_images(self) -> int:
        """Number of JPEG images of the clip: of optical flow with two images per flow field x1, y1, x2, y2 and so on."""
        return self.num_frames * IMAGES_PER_FRAME[self.codec]

    def images_of(self, frame: int) -> range:
        """Return the numbers of a frame's images."""
        images = IMAGES_PER_FRAME[self.codec]
        return range(frame * images, (frame + 1) * images)


def in_shard(row: ManifestRow) -> bool:
    """Tell whether the clip is in a shard."""
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
    "colour_space": pa.string(),
    "colour_range": pa.string(),
    "mirrored": pa.bool_(),
    "fast_seek": pa.bool_(),
    "name": pa.string(),
}
_NAMES = [field.name for field in fields(ManifestRow)]
_REQUIRED = [field.name for field in fields(ManifestRow) if field.default is MISSING]
_NULLABLE = "fast_seek"
_SCHEMA = pa.schema([pa.field(name, _TYPES[name], nullable=name == _NULLABLE) for name in _NAMES])


class Manifest:
    """The clips of a split, read-only. Pickles as its path: a worker process maps the same file again."""

    def __init__(self, path: Path, table: pa.Table, meta: dict[str, Any]) -> None:
        self.path = path
        self.root: Path = path.parent
        self.classes: list[str] = meta["classes"]
        self.order_groups: list[int] | None = meta["order_groups"]
        """A number per class: classes with the same number differ only in the order of their frames. None: unknown."""
        self.split: str | None = meta["split"]
        self.digest: str = meta["digest"]
        """sha256 of the header and every row, but for names and the columns EVIDENCE, computed when the manifest was written."""
        self.evidence: str = meta.get("evidence", "")
        """sha256 of names and the columns EVIDENCE; empty in older manifests, whose `digest` is of all columns."""
        self._table = table
        self._blocks = table.to_batches()
        self._starts = np.cumsum([0, *(block.num_rows for block in self._blocks)])

    @classmethod
    def open(cls, path: str | Path) -> "Manifest":
        """Map the file and validate all rows, vectorized: no row becomes a Python object.

        No damage to the file crashes a later reader. `require_as_written` also finds damage that leaves valid rows.
        """
        path = Path(path)
        try:
            file = pa.memory_map(str(path))
        except FileNotFoundError:
            raise ManifestError(f"{path}: no such manifest; {HINT}") from None
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read ({error})") from error
        try:
            # Zero-copy: the columns point into the mapped file.
            table = pa.ipc.open_file(file).read_all()
            # First of all: a damaged offset or length crashes whatever reads the column. In full: also each string's bytes.
            table.validate(full=True)
        # ValueError: a column's name that is no UTF-8.
        except (pa.ArrowException, ValueError, OSError) as error:
            raise ManifestError(f"{path}: not an Arrow file, or truncated ({error}); {HINT}") from error
        manifest = cls(path, table, _read_meta(path, table.schema))
        _check(str(path), table, manifest.classes, manifest.order_groups)
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
        # An older manifest has fewer columns: the last fields keep their defaults.
        return ManifestRow(*(column[at].as_py() for column in block.columns))

    @property
    def labelled(self) -> bool:
        """The labels of the clips are known; otherwise all of them are UNLABELLED."""
        return self._table.column("label")[0].as_py() != UNLABELLED

    def labels(self) -> np.ndarray:
        """Return label_N, int32 (a copy if the manifest has several blocks)."""
        return self._table.column("label").to_numpy()

    def kinds(self, *names: str) -> dict[tuple[Any, ...], int]:
        """Count the clips by their values of these fields."""
        counts = self._with_defaults(names).group_by(list(names)).aggregate([([], "count_all")])
        columns = [counts.column(name).to_pylist() for name in (*names, "count_all")]
        return {tuple(values): count for *values, count in zip(*columns, strict=True)}

    def rows_of(self, most: int, **values: Any) -> list[int]:
        """List the first rows whose fields have these values, at most `most`."""
        columns = dict(zip(values, self._with_defaults(values).columns, strict=True))
        matches = [
            pc.is_null(columns[name]) if value is None else pc.equal(columns[name], value)
            for name, value in values.items()
        ]
        return pc.indices_nonzero(reduce(pc.and_, matches))[:most].to_pylist()

    def _with_defaults(self, names: Iterable[str]) -> pa.Table:
        """Select columns; those that an older manifest lacks have their fields' defaults."""
        defaults = {field.name: field.default for field in fields(ManifestRow)}
        found = self._table.schema.names
        columns = [
            self._table.column(name) if name in found else pa.repeat(pa.scalar(defaults[name], _TYPES[name]), len(self))
            for name in names
        ]
        return pa.table(columns, names=list(names))

    def modalities(self) -> set[str]:
        """Return the modalities of the clips."""
        return {modality_of(codec) for codec in self._table.column("codec").unique().to_pylist()}

    def fast_seek(self) -> tuple[int, int, int]:
        """Count the videos for which `fast_seek` is (True, False, None)."""
        is_video = pc.invert(pc.is_in(self._table.column("codec"), pa.array(list(IMAGES_PER_FRAME))))
        if _NULLABLE not in self._table.schema.names:
            return 0, 0, pc.sum(is_video).as_py()
        values = self._table.column(_NULLABLE).filter(is_video)
        fast = pc.sum(values).as_py() or 0
        return fast, len(values) - fast - values.null_count, values.null_count

    def decodes_as(self, other: "Manifest") -> bool:
        """Tell whether the columns EVIDENCE are those of another manifest of the same clips."""
        return self._with_defaults(EVIDENCE).equals(other._with_defaults(EVIDENCE))

    def is_as_written(self) -> bool:
        """Tell whether header and rows still have the digests that were computed when they were written."""
        header = {"version": VERSION, "classes": self.classes, "order_groups": self.order_groups, "split": self.split}
        if not self.evidence:
            return older_digest(header, self._blocks) == self.digest
        found = content_digest(header, self._blocks), evidence_digest(self._blocks)
        return found == (self.digest, self.evidence)

    def require_as_written(self) -> None:
        """Raise ManifestError unless `is_as_written`."""
        if not self.is_as_written():
            raise ManifestError(
                f"{self.path}: its content does not match its digest: the file was changed, or damaged, after it was written"
            )


def write_manifest(
    path: str | Path,
    rows: Iterable[ManifestRow],
    classes: Sequence[str],
    order_groups: Sequence[int] | None = None,
    split: str | None = None,
) -> str:
    """Write a manifest atomically, after the checks that opening makes, and more. Returns its digest."""
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
    if fault := flow_fault(table, SHARD_SUFFIX):
        raise ManifestError(f"{path}: {fault}")
    header = {"version": VERSION, "classes": names, "order_groups": groups, "split": split}
    digest = content_digest(header, blocks)
    meta = {**header, "digest": digest, "evidence": evidence_digest(blocks)}
    schema = _SCHEMA.with_metadata({b"tsm": json.dumps(meta).encode()})

    with atomic_write(path) as file, pa.ipc.new_file(file, schema) as writer:
        for block in blocks:
            writer.write_batch(block.replace_schema_metadata(schema.metadata))
    return digest


def _read_meta(path: Path, schema: pa.Schema) -> dict[str, Any]:
    try:
        meta = json.loads((schema.metadata or {})[b"tsm"])
        version = meta["version"]
    except (KeyError, ValueError, TypeError):
        raise ManifestError(f"{path}: an Arrow file, but not a manifest (no 'tsm' in its metadata); {HINT}") from None
    if version != VERSION:
        raise ManifestError(f"{path}: manifest version {version}, but this code reads only version {VERSION}; {HINT}")
    missing = [key for key in ("classes", "order_groups", "split", "digest") if key not in meta]
    if missing:
        raise ManifestError(f"{path}: its metadata has no {', '.join(missing)}; {HINT}")
    kinds = {"classes": list, "order_groups": list | None, "split": str | None, "digest": str, "evidence": str}
    wrong = [key for key, kind in kinds.items() if key in meta and not isinstance(meta[key], kind)]
    if wrong or not all(isinstance(name, str) for name in meta["classes"]):
        raise ManifestError(f"{path}: its metadata has a wrong {', '.join(wrong) or 'class name'}; {HINT}")
    return meta


def _check(where: str, table: pa.Table, classes: list[str], order_groups: list[int] | None) -> None:
    """Raise ManifestError unless columns, classes and values are valid."""
    if fault := column_fault(table.schema, _TYPES, len(_REQUIRED)):
        raise ManifestError(f"{where}: {fault}")
    if not classes or len(set(classes)) != len(classes):
        raise ManifestError(f"{where}: {len(classes)} classes with {len(set(classes))} different names")
    if order_groups is not None and len(order_groups) != len(classes):
        raise ManifestError(
            f"{where}: {len(order_groups)} order groups for {len(classes)} classes; give one number per class"
        )
    if fault := value_fault(table, len(classes), _NULLABLE, UNLABELLED):
        raise ManifestError(f"{where}: {fault}")


def image_file(pattern: Path, row: ManifestRow, image: int) -> Path:
    """Compute the file of an image of a clip of JPEG images in files, counted from 0; `pattern`: the row's path, in any folder."""
    images = IMAGES_PER_FRAME[row.codec]
    name = pattern.name.replace(COMPONENT, "xy"[image % images]) if row.codec == JPEG_FLOW else pattern.name
    return pattern.with_name(name % (row.offset + image // images))

"""Digests of a manifest's values, not of Arrow's bytes, whose layout may differ between versions of Arrow."""

import hashlib
import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

EVIDENCE = ("colour_space", "colour_range", "fast_seek")
"""Columns that say how to decode a clip, and not what it shows. They have a digest of their own: a run resumes with the manifest
of a new scan of the same clips."""
NAME = "name"
"""The column of the clips' names. It decides no training either, so shards of an older version can get their names."""
_PIECE_ROWS = 4096


def content_digest(header: dict[str, Any], blocks: list[pa.RecordBatch]) -> str:
    """Digest the header, and all columns but NAME and those of EVIDENCE.

    Without a mirrored clip, the digest is that of an older manifest, which lacks the column.
    """
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    left_out = {*EVIDENCE, NAME}
    if not any("mirrored" in block.schema.names and pc.any(block.column("mirrored")).as_py() for block in blocks):
        left_out.add("mirrored")
    for block in blocks:
        _update(digest, [block.column(name) for name in block.schema.names if name not in left_out])
    return digest.hexdigest()


def evidence_digest(blocks: list[pa.RecordBatch]) -> str:
    """Digest NAME and the columns of EVIDENCE."""
    digest = hashlib.sha256()
    for block in blocks:
        _update(digest, [block.column(name) for name in (*EVIDENCE, NAME) if name in block.schema.names])
    return digest.hexdigest()


def older_digest(header: dict[str, Any], blocks: list[pa.RecordBatch]) -> str:
    """Digest as the older versions did that had no digest of EVIDENCE: the header, and all columns."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for column in (column for block in blocks for column in block.columns):
        if pa.types.is_boolean(column.type):
            digest.update(column.to_numpy(zero_copy_only=False).tobytes())
        else:
            _update(digest, [column])
    return digest.hexdigest()


def _update(digest: Any, columns: list[pa.Array]) -> None:
    for column in columns:
        if pa.types.is_integer(column.type):
            digest.update(column.to_numpy().tobytes())
        else:
            _update_with_json(digest, column)


def _update_with_json(digest: Any, column: pa.Array) -> None:
    """Digest json.dumps of the whole column, piece by piece: a million Python strings would stay in the process's memory."""
    digest.update(b"[")
    for first in range(0, len(column), _PIECE_ROWS):
        separator = ", " if first else ""
        digest.update(f"{separator}{json.dumps(column[first : first + _PIECE_ROWS].to_pylist())[1:-1]}".encode())
    digest.update(b"]")

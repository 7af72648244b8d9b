"""Digests of a manifest's values, not of Arrow's bytes, whose layout may differ between versions of Arrow."""

import hashlib
import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

EVIDENCE = ("colour_space", "colour_range", "fast_seek")
"""Columns that say how to decode a clip, and not what it shows. They have a digest of their own: a run resumes with the manifest
of a new scan of the same clips."""


def content_digest(header: dict[str, Any], blocks: list[pa.RecordBatch]) -> str:
    """Digest the header, and all columns but those of EVIDENCE.

    Without a mirrored clip, the digest is that of an older manifest, which lacks the column.
    """
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    left_out = set(EVIDENCE)
    if not any("mirrored" in block.schema.names and pc.any(block.column("mirrored")).as_py() for block in blocks):
        left_out.add("mirrored")
    for block in blocks:
        _update(digest, [block.column(name) for name in block.schema.names if name not in left_out])
    return digest.hexdigest()


def evidence_digest(blocks: list[pa.RecordBatch]) -> str:
    """Digest the columns of EVIDENCE."""
    digest = hashlib.sha256()
    for block in blocks:
        _update(digest, [block.column(name) for name in EVIDENCE])
    return digest.hexdigest()


def _update(digest: Any, columns: list[pa.Array]) -> None:
    for column in columns:
        if pa.types.is_integer(column.type):
            digest.update(column.to_numpy().tobytes())
        else:
            digest.update(json.dumps(column.to_pylist()).encode())

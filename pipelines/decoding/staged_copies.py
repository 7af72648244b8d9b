"""Copies of a data set's files on a node's own disk, which `prepare.py stage` makes: each under its own absolute path.

The manifest stays the shared one, so all ranks agree on it whatever their nodes hold, and any file may lack its copy.
"""

import os
import sys
from functools import lru_cache
from pathlib import Path

from pipelines.manifest import JPEG_FRAMES, ManifestRow, frame_file, in_shard

VARIABLE = "TSM_STAGED_FILES"
"""The environment variable that names the folder of the copies."""

_given_up: set[Path] = set()


def find_copy(root: Path, row: ManifestRow) -> Path | None:
    """Where to read a row's path instead; None without a whole copy."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    copy = copy_path(Path(folder), root, row.path)
    in_files = row.codec == JPEG_FRAMES and not in_shard(row)
    last = frame_file(copy, row.offset + row.num_frames - 1) if in_files else copy
    return copy if copy not in _given_up and last.exists() else None


def copy_path(folder: Path, root: Path, path: str) -> Path:
    """Where the copy of a file is; `root`: the manifest's folder, `path`: as a row of it has it."""
    return folder / os.path.normpath(_resolved(root) / path).lstrip(os.sep)


@lru_cache(maxsize=16)
def _resolved(root: Path) -> Path:
    return root.resolve()


def give_up(copy: Path, why: str) -> None:
    """Leave a copy alone from now on, in this process."""
    _given_up.add(copy)
    print(f"a copy on this node's disk has gone bad: {why}", file=sys.stderr, flush=True)

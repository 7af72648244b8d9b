"""The encoded bytes of a clip, wherever it is kept: in a file of its own, or as a folder of JPEG files."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .frames import frame_file
from .manifest import ManifestRow
from .scan import BadClip


def check_file(path: Path, row: ManifestRow) -> None:
    """Raises BadClip when the clip's file is missing, or is not the one that the manifest was made of."""
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise BadClip(f"{path}: {error.strerror}") from error
    _check_size(path, size, row)


def clip_bytes(root: Path, row: ManifestRow) -> NDArray[np.uint8]:
    """All bytes of a clip that is one video. Raises BadClip like `check_file`."""
    path = root / row.path
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise BadClip(f"{path}: {error.strerror or error}") from error
    _check_size(path, len(content), row)
    return content


def frame_bytes(root: Path, row: ManifestRow, index: int) -> tuple[str, bytes]:
    """(what it is called in messages, the encoded bytes) of a frame of a clip of JPEG_FRAMES. Raises BadClip."""
    path = frame_file(root / row.path, row.offset + index)
    if not 0 <= index < row.num_frames:
        raise BadClip(f"{path}: frame {index} of a clip of {row.num_frames}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadClip(f"{path}: {error.strerror}") from error
    return str(path), content


def _check_size(path: Path, size: int, row: ManifestRow) -> None:
    if size != row.length:
        raise BadClip(f"{path}: {size} bytes, but {row.length} when the manifest was made: truncated or replaced since")

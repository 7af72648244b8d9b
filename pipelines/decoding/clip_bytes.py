"""The encoded bytes of a clip, wherever it is kept: in a file of its own, as a folder of JPEG files, or in a shard."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import BadClip
from pipelines.manifest import JPEG_FRAMES, ManifestRow, frame_file, in_shard

from .shard_reader import _open_shard
from .staged_copies import find_copy, give_up
from .video import EncodedVideo, video_stream

Read = TypeVar("Read")


def clip_bytes(root: Path, row: ManifestRow) -> NDArray[np.uint8]:
    """All bytes of a clip that is one video, of the manifest in `root`, for a decoder that takes nothing else.

    Raises BadClip when the clip is missing, or is not the one that the manifest was made of; so do the functions below. Here also
    when its head cannot be read, or asks for pictures larger than the scan allows: DALI would end its pipeline, or take all memory.
    """
    return from_nearest(root, row, lambda path: _checked_bytes(video_at(path, row), row))


def _checked_bytes(video: EncodedVideo, row: ManifestRow) -> NDArray[np.uint8]:
    try:
        with video_stream(video):
            return read_video(video, row)
    except BadClip:
        raise
    except Exception as error:  # as many as there are ways to be broken
        raise BadClip(f"{video.name}: cannot be opened: {error}") from error


def frame_bytes(root: Path, row: ManifestRow, index: int) -> tuple[str, bytes]:
    """(what it is called in messages, the encoded bytes) of a frame of a clip of JPEG_FRAMES."""
    return from_nearest(root, row, lambda path: frame_at(path, row, index))


def encoded_video(root: Path, row: ManifestRow) -> EncodedVideo:
    """A clip that is one video, for a decoder to open."""
    return from_nearest(root, row, lambda path: video_at(path, row))


def from_nearest(root: Path, row: ManifestRow, read: Callable[[Path], Read]) -> Read:
    """`read` what the row's path leads to: the copy on this node's disk where there is one (pipelines/decoding/staged_copies.py).

    What is bad there and good where it was copied from makes this process leave the copy alone from then on, with a line on
    standard error.
    """
    path = root / row.path
    copy = find_copy(root, row)
    if copy is None:
        return read(path)
    try:
        return read(copy)
    except BadClip as error:
        result = read(path)
        give_up(copy, f"{error}; reading {path}")
        return result


def video_at(path: Path, row: ManifestRow) -> EncodedVideo:
    """`path`: the file itself, or the shard."""
    if in_shard(row):
        member, content = _open_shard(path).member(row.offset, row.length)
        return EncodedVideo(f"{path}, {member}", Path(member).suffix, content)
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise BadClip(f"{path}: {error.strerror}") from error
    _check_size(path, size, row)
    return EncodedVideo(str(path), path.suffix.lower(), path)


def read_video(video: EncodedVideo, row: ManifestRow) -> NDArray[np.uint8]:
    """The bytes of what `video_at` found."""
    if isinstance(video.source, np.ndarray):
        return video.source
    try:
        content = np.fromfile(video.source, dtype=np.uint8)
    except OSError as error:
        raise BadClip(f"{video.name}: {error.strerror or error}") from error
    _check_size(video.source, len(content), row)
    return content


def frame_at(path: Path, row: ManifestRow, index: int) -> tuple[str, bytes]:
    """`path`: the pattern of the frames' files, or the shard."""
    if not 0 <= index < row.num_frames:
        raise BadClip(f"{path}: frame {index} of a clip of {row.num_frames}")
    if in_shard(row):
        shard = _open_shard(path)
        start, length = shard.frames(row.offset, row.num_frames)[index].tolist()
        member, frame = shard.member(row.offset + start, length)
        return f"{path}, {member}", frame.tobytes()
    path = frame_file(path, row.offset + index)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadClip(f"{path}: {error.strerror}") from error
    return str(path), content


def check_clip(root: Path, row: ManifestRow) -> None:
    """Raises BadClip unless the clip is where its row says, and as long; its bytes are not read."""
    path = root / row.path
    if in_shard(row):
        shard = _open_shard(path)
        if row.codec != JPEG_FRAMES:
            shard.member_name(row.offset, row.length)
            return
        index = shard.frames(row.offset, row.num_frames)
        for start, length in index.tolist():
            shard.member_name(row.offset + start, length)
        end = int(index[-1]["start"] + index[-1]["length"])
        if end != row.length:
            raise BadClip(f"{path}: frames of {end} bytes, but {row.length} when the manifest was made: replaced since")
        return
    if row.codec != JPEG_FRAMES:
        video_at(path, row)
        return
    try:
        size = sum(os.stat(frame_file(path, row.offset + index)).st_size for index in range(row.num_frames))
    except OSError as error:
        raise BadClip(f"{error.filename}: {error.strerror}") from error
    _check_size(path, size, row)


def _check_size(path: Path, size: int, row: ManifestRow) -> None:
    if size != row.length:
        raise BadClip(f"{path}: {size} bytes, but {row.length} when the manifest was made: truncated or replaced since")

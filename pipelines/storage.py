"""The encoded bytes of a clip, wherever it is kept: in a file of its own, as a folder of JPEG files, or in a shard."""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .containers import EncodedVideo
from .copies import find_copy, give_up
from .frames import frame_file
from .manifest import JPEG_FRAMES, ManifestRow, in_shard
from .scan import BadClip, video_stream
from .tar import BLOCK_BYTES, read_header

INDEX_DTYPE = np.dtype([("start", "<u8"), ("length", "<u8")])
"""An entry of the index in front of a clip of JPEG frames in a shard: where a frame's bytes are, in bytes behind the index'
own first byte."""

Read = TypeVar("Read")

_OPEN_SHARDS = 128  # of each process; a system allows 1,024 open files or more


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
    """`read` what the row's path leads to: the copy on this node's disk where there is one (pipelines/copies.py).

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


def close_shards() -> None:
    """Forget the shards that are open: what is read from now on is opened anew."""
    _open_shard.cache_clear()
    _frame_index.cache_clear()


class Shard:
    """A shard that stays open while its clips are read: a look into a folder for each clip of each rank is what the metadata
    server of a parallel file system can bear least."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise BadClip(f"{path}: {error.strerror}") from error

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def member(self, offset: int, length: int) -> tuple[str, NDArray[np.uint8]]:
        """(name, bytes) of the member whose bytes are at `offset`; BadClip unless one of that length is there."""
        content = self._read(offset - BLOCK_BYTES, BLOCK_BYTES + length)
        return self._check_header(content[:BLOCK_BYTES], offset, length), content[BLOCK_BYTES:]

    def member_name(self, offset: int, length: int) -> str:
        """Like `member`, without reading its bytes."""
        assert self._descriptor is not None
        if os.fstat(self._descriptor).st_size < offset + length:
            raise BadClip(f"{self.path}: ends before byte {offset + length}, in the middle of a clip: truncated")
        return self._check_header(self._read(offset - BLOCK_BYTES, BLOCK_BYTES), offset, length)

    def frames(self, offset: int, num_frames: int) -> NDArray[np.void]:
        """The index of INDEX_DTYPE, (T,), of a clip of JPEG frames."""
        return _frame_index(self, offset, num_frames)

    def _check_header(self, block: NDArray[np.uint8], offset: int, length: int) -> str:
        try:
            name, found = read_header(block.tobytes())
        except ValueError as error:
            raise BadClip(
                f"{self.path}: {error} in front of byte {offset}: replaced since the manifest was made"
            ) from None
        if found != length:
            raise BadClip(
                f"{self.path}: {name} has {found} bytes, but {length} when the manifest was made: replaced since"
            )
        return name

    def _read(self, offset: int, length: int) -> NDArray[np.uint8]:
        content = np.empty(length, dtype=np.uint8)
        view = content.data
        assert self._descriptor is not None
        done = 0
        while done < length:
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                _open_shard.cache_clear()  # a file system that was gone may be back, under new handles
                raise BadClip(f"{self.path}: {error.strerror}") from error
            if count == 0:
                raise BadClip(f"{self.path}: ends at byte {offset + done}, in the middle of a clip: truncated")
            done += count
        return content


@lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(path: Path) -> Shard:
    return Shard(path)


@lru_cache(maxsize=64)
def _frame_index(shard: Shard, offset: int, num_frames: int) -> NDArray[np.void]:
    """Kept for the next frames of the clip."""
    _, content = shard.member(offset, num_frames * INDEX_DTYPE.itemsize)
    return content.view(INDEX_DTYPE)


def _check_size(path: Path, size: int, row: ManifestRow) -> None:
    if size != row.length:
        raise BadClip(f"{path}: {size} bytes, but {row.length} when the manifest was made: truncated or replaced since")

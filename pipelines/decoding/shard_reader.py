"""Read clips out of shards."""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import BadClip

from .tar import BLOCK_BYTES, read_header

INDEX_DTYPE = np.dtype([("start", "<u8"), ("length", "<u8")])
"""An entry of the index in front of a clip of JPEG frames in a shard: where a frame's bytes are, in bytes behind the index'
own first byte."""


_OPEN_SHARDS = 128  # of each process; a system allows 1,024 open files or more


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

"""Read clips from shards: plain tar files that stay open, whose members are found by the offsets in the manifest."""

import os
import weakref
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import BadClip

from .tar import BLOCK_BYTES, read_header

INDEX_DTYPE = np.dtype([("start", "<u8"), ("length", "<u8")])
"""An entry of the index that precedes a clip of JPEG images in a shard: where an image's bytes are, counted from the index's
first byte."""

# Per process; systems allow 1,024 open files or more.
_OPEN_SHARDS = 128


def close_shards() -> None:
    """Forget the open shards; later reads open their files again."""
    open_shard.cache_clear()
    _image_index.cache_clear()


class Shard:
    """A shard that stays open while its clips are read.

    Opening it for each clip on each rank would overload the metadata server of a parallel file system.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise BadClip(f"{path}: {error.strerror}") from error
        # Not in __del__: at exit Python sets the globals of modules to None before it deletes the last shards, `os` too. Then the
        # kernel closes them.
        weakref.finalize(self, os.close, self._descriptor).atexit = False

    def member(self, offset: int, length: int) -> tuple[str, NDArray[np.uint8]]:
        """Read (name, bytes) of the member whose content starts at `offset`. Raises BadClip if its length is not `length`."""
        content = self._read(offset - BLOCK_BYTES, BLOCK_BYTES + length)
        return self._check_header(content[:BLOCK_BYTES], offset, length), content[BLOCK_BYTES:]

    def member_name(self, offset: int, length: int) -> str:
        """Check a member as `member` does and return its name, without reading its content."""
        if os.fstat(self._descriptor).st_size < offset + length:
            raise BadClip(f"{self.path}: ends before byte {offset + length}, in the middle of a clip: truncated")
        return self._check_header(self._read(offset - BLOCK_BYTES, BLOCK_BYTES), offset, length)

    def images(self, offset: int, num_images: int) -> NDArray[np.void]:
        """Read the index, INDEX_DTYPE of shape (num_images,), of a clip of JPEG images."""
        return _image_index(self, offset, num_images)

    def _check_header(self, block: NDArray[np.uint8], offset: int, length: int) -> str:
        try:
            name, found = read_header(block.tobytes())
        except ValueError as error:
            message = f"{self.path}: {error} before byte {offset}: replaced since the manifest was made"
            raise BadClip(message) from None
        if found != length:
            raise BadClip(
                f"{self.path}: {name} has {found} bytes, but {length} when the manifest was made: replaced since"
            )
        return name

    def _read(self, offset: int, length: int) -> NDArray[np.uint8]:
        content = np.empty(length, dtype=np.uint8)
        view = content.data
        done = 0
        while done < length:
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                # A file system that was away may be back; only new file handles work then.
                open_shard.cache_clear()
                raise BadClip(f"{self.path}: {error.strerror}") from error
            if count == 0:
                raise BadClip(f"{self.path}: ends at byte {offset + done}, in the middle of a clip: truncated")
            done += count
        return content


@lru_cache(maxsize=_OPEN_SHARDS)
def open_shard(path: Path) -> Shard:
    """Open a shard, or return it if it is open. Raises BadClip if it cannot be opened."""
    return Shard(path)


@lru_cache(maxsize=64)
def _image_index(shard: Shard, offset: int, num_images: int) -> NDArray[np.void]:
    """Read a clip's index; cached for its next images."""
    _, content = shard.member(offset, num_images * INDEX_DTYPE.itemsize)
    return content.view(INDEX_DTYPE)

"""Tell a file system that fails from a clip that is bad, and wait until it is back.

A bad clip is replaced and counted. Nothing is known about a clip that cannot be read because a file server is away.
"""

import errno
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pipelines.errors import BadClip, StorageFault
from pipelines.manifest import ManifestRow, image_file, in_shard
from runtime.server_faults import SERVER_FAULTS

from .shard_reader import close_shards

_FAULTS = SERVER_FAULTS | {
    *(errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOLCK, errno.EAGAIN, errno.EBUSY)
}
"""Errors that say nothing about a file."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0

_CHUNK_BYTES = 1 << 20

_Result = TypeVar("_Result")


def read_patiently(read: Callable[[], _Result], root: Path, row: ManifestRow, limit_s: float) -> _Result:
    """Call `read`, which reads this row's clip, and call it again while the file system fails, for up to `limit_s`.

    Raises what `read` raises, BadClip included; StorageFault if the file system still fails after `limit_s`.
    """
    give_up_s, wait_s = time.monotonic() + limit_s, _FIRST_WAIT_S
    while True:
        try:
            return read()
        except BadClip as error:
            fault = _fault_behind(error, root, row)
            if fault is None:
                raise
            where = f"{fault.filename or root / row.path}: {os.strerror(fault.errno or 0)}"
            if time.monotonic() + wait_s > give_up_s:
                raise StorageFault(
                    f"{where}, for {limit_s:g} s: the file system fails, and the clip may be good. "
                    "Fix: bring it back, then start the run again; data.retry_s is the time to wait"
                ) from error
        print(f"storage: {where}; trying again in {wait_s:g} s", file=sys.stderr, flush=True)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        # A descriptor of a file server that was away stays stale.
        close_shards()


def _fault_behind(error: BadClip, root: Path, row: ManifestRow) -> OSError | None:
    """Return the file system's error that made a clip look bad, or None if its bytes can be read."""
    cause = error.__cause__
    # PyAV's exceptions are OSErrors too, and have numbers for damaged content.
    if type(cause) is OSError and cause.errno in _FAULTS:
        return cause
    try:
        for path, offset, length in _extents(root, row):
            _read(path, offset, length)
    except OSError as failed:
        return failed if failed.errno in _FAULTS else None
    return None


def _extents(root: Path, row: ManifestRow) -> Iterator[tuple[Path, int, int]]:
    """Yield (file, offset, length) of a clip's bytes in the shared folder."""
    path = root / row.path
    if in_shard(row) or not row.is_images:
        yield path, max(0, row.offset), row.length
        return
    for image in range(row.num_images):
        yield image_file(path, row, image), 0, row.length


def _read(path: Path, offset: int, length: int) -> None:
    """Read bytes and forget them. Raises OSError."""
    # Not to wait for the writer of a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        end = offset + length
        while offset < end and (part := os.pread(descriptor, min(_CHUNK_BYTES, end - offset), offset)):
            offset += len(part)
    finally:
        os.close(descriptor)

"""Locks between processes: flock(2), which the kernel releases when a process dies, or a lease file where flock does not work.

Lustre mounted without `-o flock`, DVS and some FUSE and NFS mounts have no flock. All nodes that share a folder must mount it
the same way: a lease and a flock do not exclude each other.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from .lease import LEASE_SUFFIX, LockHeld, describe, identity, take_lease

__all__ = ["Hold", "LockHeld", "file_lock", "hold"]

# What flock fails with on file systems without it: a missing function, operation or lock server.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Hold:
    """A lock that this process holds until `release`, or until the block that it opens ends."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold(path: Path) -> Hold:
    """Lock a file that serves only as a lock, made when missing, and write into it who holds it; at once.

    Raises LockHeld, which names the holder, while another process holds it; OSError if the file cannot be written. Processes
    started by exec do not inherit the lock. On file systems without flock a holder on another machine is watched for up to a
    minute, to tell whether it is alive.
    """
    descriptor = _open(path)
    try:
        locked = _flock(descriptor, wait=False)
        if locked is None:
            release_lease = take_lease(lease_path(path))
            os.close(descriptor)
            return Hold(release_lease)
        if not locked:
            raise LockHeld(describe(os.pread(descriptor, 4096, 0).decode(errors="replace")))
        text = identity().encode()
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))
    except BaseException:
        os.close(descriptor)
        raise

    def release() -> None:
        # The file stays: a process that has opened it already could otherwise lock one that others no longer find.
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)

    return Hold(release)


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock on a file, made when missing, or on an existing folder; yields whether this process holds it.

    With `wait=False` the block runs at once, and gets False while another process holds the lock. The file's content is not
    touched.
    """
    descriptor = _open(path)
    release = None
    try:
        locked = _flock(descriptor, wait)
        if locked is None:
            try:
                release = take_lease(lease_path(path), wait)
                locked = True
            except LockHeld:
                locked = False
        yield locked
    finally:
        if release is not None:
            release()
        os.close(descriptor)


def lease_path(path: Path) -> Path:
    """Return the lease file of a lock: next to a file, within a folder."""
    return path / LEASE_SUFFIX if path.is_dir() else path.with_name(path.name + LEASE_SUFFIX)


def _open(path: Path) -> int:
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    return os.open(path, flags | os.O_CLOEXEC, 0o666)


def _flock(descriptor: int, wait: bool) -> bool | None:
    """Lock an open file until it is closed; returns whether this process holds it, None where flock does not work."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True

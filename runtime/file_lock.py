"""Locks between processes on files, by flock(2): the kernel releases the lock of a process that dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock on a file, made when missing, or on an existing folder; yields whether this process holds it.

    With `wait=False` the block runs at once, and gets False while another process holds the lock.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield lock_open_file(descriptor, wait)
    finally:
        os.close(descriptor)


def lock_open_file(file: int | IO[bytes] | IO[str], wait: bool = True) -> bool:
    """Lock an open file until it is closed; returns whether this process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True

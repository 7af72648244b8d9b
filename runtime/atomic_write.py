"""Atomic writes: a reader finds the whole new file, or what was there before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of every file that is being written. One that a killed process left is overwritten by the next write."""


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file next to `path` that replaces it when the block ends; after an exception neither is changed.

    `durable`: the file and its folder are synced, so that the result survives a crash of the machine. False only for what
    can be made again from data that is still there.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write a whole text file in UTF-8, atomically."""
    with atomic_write(path, durable) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Sync a folder: a rename in it is on the disk only after that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The identity of a file or folder, by which one that several names and links lead to is recognized."""

import os
from functools import lru_cache
from pathlib import Path

FileId = tuple[int, int, int, int]


def file_id(path: Path) -> FileId | None:
    """Return what identifies the file or folder that a path leads to; None if there is none.

    Device and inode, and size and time of modification, because some network file systems repeat inode numbers.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def real_path(path: Path) -> Path:
    """Return the path with the links of its folders resolved, but not of its last part: the same for every spelling."""
    if path.name in ("", ".."):
        return path.resolve()
    return real_folder(path.parent) / path.name


@lru_cache(maxsize=4096)
def real_folder(path: Path) -> Path:
    """Return a folder with all links resolved; remembers the answer."""
    return path.resolve()


def first_three(names: list[str]) -> str:
    """Return the first three names, for a message, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

"""Find the videos of a data set on the disk."""

import os
from collections import defaultdict
from pathlib import Path

from pipelines.prepare.errors import DataSetError

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts")
)


def require_folder(folder: Path) -> Path:
    """Return the folder of the clips, or raise DataSetError if it does not exist."""
    if not folder.is_dir():
        raise DataSetError(f"{folder}: no such folder. Fix: give the folder of the clips with --videos")
    return folder


def entries_by_stem(folder: Path) -> dict[str, Path]:
    """Return the videos and folders directly in `folder` by stem; a video wins over a folder of the same stem."""
    found: dict[str, Path] = {}
    with os.scandir(require_folder(folder)) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = Path(entry.name)
            if name.suffix.lower() in VIDEO_SUFFIXES:
                found[name.stem] = folder / name
            elif not name.suffix and entry.is_dir():
                found.setdefault(name.stem, folder / name)
    return found


def videos_by_stem(folder: Path) -> dict[str, list[Path]]:
    """Return every video anywhere below `folder` by stem. It only lists folders and opens no file."""
    found: dict[str, list[Path]] = defaultdict(list)
    for parent, folders, names in os.walk(require_folder(folder), followlinks=True):
        folders.sort()
        for path in (Path(parent, name) for name in sorted(names)):
            if path.suffix.lower() in VIDEO_SUFFIXES:
                found[path.stem].append(path)
    return found

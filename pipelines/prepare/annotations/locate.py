"""Where the videos of a data set are on the disk."""

import os
from collections import defaultdict
from pathlib import Path

from pipelines.prepare.errors import DataSetError

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts")
)


def require_folder(folder: Path, option: str = "--videos") -> Path:
    if not folder.is_dir():
        raise DataSetError(f"{folder}: no such folder; say where the clips are with {option}")
    return folder


def entries_by_stem(folder: Path) -> dict[str, Path]:
    """The videos and folders directly in `folder`, by name without ending; of a clip that is there twice the video."""
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
    """Every video anywhere below `folder`, by name without ending; only folders are read, no file is touched."""
    found: dict[str, list[Path]] = defaultdict(list)
    for parent, folders, names in os.walk(require_folder(folder), followlinks=True):
        folders.sort()
        for path in (Path(parent, name) for name in sorted(names)):
            if path.suffix.lower() in VIDEO_SUFFIXES:
                found[path.stem].append(path)
    return found

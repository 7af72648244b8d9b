"""Find the videos of a data set on the disk."""

import os
from collections import defaultdict, deque
from pathlib import Path

from pipelines.prepare.errors import DataSetError

from .file_identity import FileId, file_id

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
    """Return every video anywhere below `folder` by stem. It only lists folders and opens no file.

    Links are followed. One file is one video: a folder that is reached again is not walked again, and of several names of a
    file the first is taken. Folders come before links to folders, which may lead back to them.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    walked: set[FileId | None] = set()
    waiting = deque([require_folder(folder)])
    while waiting:
        for parent, folders, names in os.walk(waiting.popleft()):
            if (identity := file_id(Path(parent))) in walked:
                folders.clear()
                continue
            walked.add(identity)
            folders.sort()
            waiting.extend(path for name in folders if (path := Path(parent, name)).is_symlink())
            for path in (Path(parent, name) for name in sorted(names)):
                if path.suffix.lower() in VIDEO_SUFFIXES:
                    found[path.stem].append(path)
    return {stem: paths if len(paths) == 1 else _distinct(paths) for stem, paths in found.items()}


def _distinct(paths: list[Path]) -> list[Path]:
    """Return one path for each file: a name that is no link where there is one. Links to nothing are left out."""
    distinct: dict[FileId, Path] = {}
    for path in sorted(paths, key=Path.is_symlink):
        identity = file_id(path)
        if identity is not None:
            distinct.setdefault(identity, path)
    return list(distinct.values()) or paths[:1]

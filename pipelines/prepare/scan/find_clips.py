"""Find the clips below a folder by their names, without annotations."""

import os
from pathlib import Path

from pipelines.prepare.annotations.file_identity import FileId, file_id
from pipelines.prepare.annotations.locate import VIDEO_SUFFIXES

from .frame_folders import is_frame_name


def find_clips(path: Path) -> list[Path]:
    """Return the clips that a path leads to, sorted: all videos and folders of JPEG frames at or below a folder, else `path`.

    Videos are known by their suffix, frames by a number at the end of the name. A folder that holds videos is no folder of
    frames, and nothing is looked for below one that is. Names that begin with a dot are skipped. Links are followed, and each
    folder is walked once.
    """
    # os.path, because Path.is_dir raises an error for what is too long for a name.
    if not os.path.isdir(path):  # noqa: PTH112
        return [path]
    found: list[Path] = []
    walked: set[FileId | None] = set()
    for parent, folders, names in os.walk(path, followlinks=True):
        folder = Path(parent)
        if (identity := file_id(folder)) in walked:
            folders.clear()
            continue
        walked.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        videos = [name for name in names if is_video_name(name)]
        found += [folder / name for name in videos]
        if not videos and any(map(is_frame_name, names)):
            found.append(folder)
            folders.clear()
    return sorted(found)


def is_video_name(name: str) -> bool:
    """Tell whether a file is a video, by its name."""
    return not name.startswith(".") and Path(name).suffix.lower() in VIDEO_SUFFIXES

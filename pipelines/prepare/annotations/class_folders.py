"""A folder per class, split by folders or by a hash of each clip's name."""

import hashlib
import os
from pathlib import Path

from pipelines.prepare.errors import DataSetError

from .base import Annotations, Clip, label_of, number_classes
from .file_identity import FileId, file_id, first_three
from .locate import VIDEO_SUFFIXES, require_folder

_SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


def read_class_folders(videos: Path, val_fraction: float | None, seed: int = 0) -> Annotations:
    """Read VIDEOS/train/CLASS/CLIP and VIDEOS/val/CLASS/CLIP; with `val_fraction` VIDEOS/CLASS/CLIP.

    A clip is a video or a folder of JPEG frames. Classes are sorted by name. Whether a clip is held out for validation
    depends only on the seed and its own name: clips added later do not move others.
    """
    require_folder(videos)
    split_folders = {split: _first_folder(videos, names) for split, names in _SPLIT_FOLDERS.items()}
    if val_fraction is not None:
        return _split_by_hash(videos, val_fraction, seed)
    if split_folders["train"] is None or split_folders["val"] is None:
        raise DataSetError(
            f"{videos} has no folders train and val. Fix: give --val-fraction 0.1 to hold out a tenth of its clips"
        )
    above = {file_id(folder) for folder in (videos, *split_folders.values()) if folder is not None}
    found = {split: _clips_below(folder, above) for split, folder in split_folders.items() if folder is not None}
    labels = number_classes(split_folders["train"], sorted({name for name, _ in found["train"][0]}))
    splits = {}
    for split, (clips, *_) in found.items():
        where = str(split_folders[split])
        splits[split] = [
            Clip(path, label_of(labels, name, str(path), f"{split_folders['train']}"), where) for name, path in clips
        ]
    skipped, leading_back = (
        sum(each[1] for each in found.values()),
        [path for each in found.values() for path in each[2]],
    )
    return Annotations(list(labels), splits, _notes(skipped, leading_back))


def _split_by_hash(videos: Path, val_fraction: float, seed: int) -> Annotations:
    if not 0 < val_fraction < 1:
        raise DataSetError(f"--val-fraction is {val_fraction}. Fix: give a number between 0 and 1")
    clips, skipped, leading_back = _clips_below(videos, {file_id(videos)})
    labels = number_classes(videos, sorted({name for name, _ in clips}))
    splits: dict[str, list[Clip]] = {"train": [], "val": []}
    for name, path in clips:
        split = "val" if _uniform(seed, path.relative_to(videos)) < val_fraction else "train"
        splits[split].append(Clip(path, labels[name], str(videos)))
    return Annotations(list(labels), splits, _notes(skipped, leading_back))


def _uniform(seed: int, name: Path) -> float:
    """Hash the seed and a clip's name to a number in [0, 1)."""
    digest = hashlib.blake2b(name.as_posix().encode("utf-8", "surrogateescape"), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest()) / 2**64


def _first_folder(parent: Path, names: tuple[str, ...]) -> Path | None:
    return next((parent / name for name in names if (parent / name).is_dir()), None)


def _clips_below(folder: Path, above: set[FileId | None]) -> tuple[list[tuple[str, Path]], int, list[str]]:
    """Return (class, clip) pairs sorted by name, the number of files without a video suffix, and links that lead back.

    `above`: folders that contain class folders. A link to one of them, or to its own class folder, holds no clips of its own.
    """
    clips, skipped, leading_back = [], 0, []
    for class_folder in sorted(folder.iterdir()):
        if not class_folder.is_dir() or class_folder.name.startswith("."):
            continue
        if (class_id := file_id(class_folder)) in above:
            leading_back.append(str(class_folder))
            continue
        with os.scandir(class_folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = class_folder / entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink() and file_id(path) in (*above, class_id):
                    leading_back.append(str(path))
                elif entry.is_dir() or Path(entry.name).suffix.lower() in VIDEO_SUFFIXES:
                    clips.append((class_folder.name, path))
                else:
                    skipped += 1
    if not clips:
        raise DataSetError(f"{folder}: no clip found. Fix: make a folder for each class, with videos in it")
    return clips, skipped, leading_back


def _notes(skipped: int, leading_back: list[str]) -> tuple[str, ...]:
    notes = []
    if skipped:
        notes.append(f"{skipped} files skipped: no video by their suffix")
    if leading_back:
        notes.append(
            f"{len(leading_back)} links skipped: they lead back to a folder above them: {first_three(leading_back)}"
        )
    return tuple(notes)

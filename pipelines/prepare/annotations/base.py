"""The annotated clips of a data set, and the parsing that its readers share."""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.jpeg_clips import JPEG_FRAMES
from pipelines.prepare.errors import DataSetError

from .file_identity import real_path


@dataclass(frozen=True, slots=True)
class Clip:
    """An annotated clip: a video file, or a folder of JPEG images."""

    path: Path
    label: int
    """Position of its class; UNLABELLED for the clips of a test list without labels."""
    where: str
    """File and line of the annotation, for messages."""
    listed_frames: int | None = None
    """Number of frames in the list, if given. The manifest gets the number that the scan finds."""


@dataclass(frozen=True)
class Annotations:
    """All splits of a data set as annotated."""

    classes: list[str]
    splits: dict[str, list[Clip]]
    """`train` and `val`, and `test` if there is one, with labels or without; clips in the order of their list."""
    notes: tuple[str, ...] = ()
    """Files and lists that the reader skipped, for the report."""
    images: str = JPEG_FRAMES
    """The codec of clips that are folders of images."""


def check_annotations(annotations: Annotations) -> None:
    """Refuse an empty split, and a clip listed twice, whatever its spelling: within a split, or for training and another."""
    listed: dict[str, dict[Path, str]] = {}
    for split, clips in annotations.splits.items():
        if not clips:
            raise DataSetError(
                f"no clip is annotated for the split {split}. Fix: check its list, or leave the split out"
            )
        # A test list may repeat validation clips (mmaction2's do). Training clips must never be evaluated on.
        others = [listed[other] for other in listed if {split, other} != {"val", "test"}]
        named = listed[split] = {}
        for clip in clips:
            path = real_path(clip.path)
            for earlier in (named, *others):
                if path in earlier:
                    raise DataSetError(
                        f"{clip.where}: {clip.path} was listed before, by {earlier[path]}. Fix: remove one of the two"
                    )
            named[path] = clip.where


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataSetError(f"{path}: not UTF-8 at byte {error.start}. Fix: save it as UTF-8 text") from None
    except OSError as error:
        raise DataSetError(
            f"{path}: cannot be read ({error.strerror}). Fix: give the folder or file of the annotations"
        ) from error


def read_lines(path: Path) -> list[tuple[str, str]]:
    """Return (where, text) of each line that is not blank."""
    # splitlines would also split at characters that a file's name may contain.
    lines = read_text(path).split("\n")
    return [(f"{path}, line {number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def read_fields(path: Path, delimiter: str) -> list[tuple[str, list[str]]]:
    """Return (where, fields) of each line that is not blank."""
    return [(where, split_line(where, line, delimiter)) for where, line in read_lines(path)]


def split_line(where: str, line: str, delimiter: str) -> list[str]:
    """Split a line into fields; a field in double quotes may contain the delimiter."""
    try:
        (parts,) = csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise DataSetError(f"{where}: cannot be split into fields ({error}): {line!r}. Fix: check its quotes") from None
    return [part.strip() for part in parts]


def first_file(folder: Path, names: Iterable[str]) -> Path:
    """Return the first of `names` that exists in `folder`: names under which the same file was published."""
    names = list(names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataSetError(
        f"{folder} has no {' or '.join(names)}. Fix: download the annotations, or give their folder with --annotations"
    )


def number_classes(path: Path, names: Iterable[str]) -> dict[str, int]:
    """Map each class name to its label, in the given order; refuse a name that appears twice."""
    labels: dict[str, int] = {}
    for name in names:
        if name in labels:
            raise DataSetError(f"{path}: the class {name!r} is listed twice. Fix: give each class its own name")
        labels[name] = len(labels)
    if not labels:
        raise DataSetError(f"{path}: no class found. Fix: list one class name per line")
    return labels


def label_of(labels: Mapping[str, int], name: str, where: str, known_from: Path | str) -> int:
    """Return the label of a class; `known_from` is the source of `labels`, for the message."""
    try:
        return labels[name]
    except KeyError:
        raise DataSetError(f"{where}: the class {name!r} is not in {known_from}. Fix: correct one of the two") from None

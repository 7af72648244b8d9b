"""What a data set's annotation files say, before any video is opened."""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.prepare.errors import DataSetError


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip as it is annotated: a video file, or a folder of JPEG frames."""

    path: Path
    label: int
    where: str
    """The annotation's file and line, for messages."""
    listed_frames: int | None = None
    """The number of frames that the list says, where it says one; what is found counts."""


@dataclass(frozen=True)
class Annotations:
    classes: list[str]
    splits: dict[str, list[Clip]]
    """`train` and `val`, and `test` where its labels are known; clips in the order of their list."""
    notes: tuple[str, ...] = ()
    """What the reader passed over, for the report."""


def check_annotations(annotations: Annotations) -> None:
    """Refuse an empty split, and a clip that is listed twice: within a split, or in training and in validation."""
    first_named: dict[Path, str] = {}
    for split, clips in annotations.splits.items():
        if not clips:
            raise DataSetError(f"no clip is annotated for the split {split}; check its list, or leave the split out")
        # test lists may repeat the validation clips (mmaction2 does that); training clips must never be evaluated on
        named = {} if split == "test" else first_named
        for clip in clips:
            if clip.path in named:
                raise DataSetError(
                    f"{clip.where}: {clip.path} was listed before, by {named[clip.path]}; remove one of the two"
                )
            named[clip.path] = clip.where


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataSetError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8 text") from None
    except OSError as error:
        raise DataSetError(f"{path}: cannot be read ({error.strerror}); give the folder of the annotations") from error


def read_lines(path: Path) -> list[tuple[str, str]]:
    """(where, text) of each line that is not blank."""
    lines = read_text(path).split("\n")  # splitlines would also cut at characters that a file's name may hold
    return [(f"{path}, line {number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def read_fields(path: Path, delimiter: str) -> list[tuple[str, list[str]]]:
    """(where, fields) of each line that is not blank; a field in double quotes may hold the delimiter."""
    fields = []
    for where, line in read_lines(path):
        fields.append((where, split_line(where, line, delimiter)))
    return fields


def split_line(where: str, line: str, delimiter: str) -> list[str]:
    try:
        (parts,) = csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise DataSetError(f"{where}: not readable as fields ({error}): {line!r}; check its quotes") from None
    return [part.strip() for part in parts]


def first_file(folder: Path, names: Iterable[str]) -> Path:
    """The first of `names` that is in `folder`; they are the names under which one file has been handed out."""
    names = list(names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataSetError(
        f"{folder} has no {' or '.join(names)}; download the annotations, or say where with --annotations"
    )


def number_classes(path: Path, names: Iterable[str]) -> dict[str, int]:
    """Class name -> label, in the given order; a name that comes twice is an error."""
    labels: dict[str, int] = {}
    for name in names:
        if name in labels:
            raise DataSetError(f"{path}: the class {name!r} is there twice; each must have a name of its own")
        labels[name] = len(labels)
    if not labels:
        raise DataSetError(f"{path}: holds no class; give one name a line")
    return labels


def label_of(labels: Mapping[str, int], name: str, where: str, known_from: Path | str) -> int:
    try:
        return labels[name]
    except KeyError:
        raise DataSetError(f"{where}: the class {name!r} is not in {known_from}; correct one of the two") from None

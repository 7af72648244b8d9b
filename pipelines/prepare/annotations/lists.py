"""Lists of clips as text: the official TSM code's, mmaction2's, SlowFast's."""

from pathlib import Path

from pipelines.manifest import UNLABELLED
from pipelines.prepare.errors import DataSetError

from .base import Annotations, Clip, label_of, number_classes, read_lines, split_line

_DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "space": " "}
DELIMITER_NAMES = tuple(_DELIMITERS)


def read_lists(lists: dict[str, Path], classes_file: Path, videos: Path, delimiter: str | None = None) -> Annotations:
    """Read lines `path label` or `path num_frames label`; in the test list also only paths, of clips without labels.

    A path is relative to `videos`, and leads to a video or a folder of JPEG frames. A label is a number from 0, or a class
    name. `classes_file` has one name per line, in the order of the labels. `delimiter` is its name; None finds the one that
    splits every line into the same number of fields. A path that contains the delimiter must be in double quotes.
    """
    labels = number_classes(classes_file, [line for _, line in read_lines(classes_file)])
    splits = {}
    for split, path in lists.items():
        lines = read_lines(path)
        if not lines:
            raise DataSetError(f"{path}: the list is empty. Fix: give a line for each clip: path and label")
        if split == "test" and (paths := _only_paths(lines, delimiter)):
            splits[split] = [Clip(videos / name, UNLABELLED, where) for where, name in paths]
            continue
        character = _DELIMITERS[delimiter] if delimiter else _find_delimiter(path, lines)
        splits[split] = [_clip(where, line, character, labels, classes_file, videos) for where, line in lines]
    return Annotations(list(labels), splits)


def _only_paths(lines: list[tuple[str, str]], delimiter: str | None) -> list[tuple[str, str]]:
    """Return (where, path) of each line, or nothing if a line has more than one field."""
    characters = [_DELIMITERS[delimiter]] if delimiter else list(_DELIMITERS.values())
    paths = []
    for where, line in lines:
        try:
            fields = [split_line(where, line, character) for character in characters]
        except DataSetError:
            return []
        if any(len(each) > 1 for each in fields):
            return []
        paths.append((where, fields[0][0]))
    return paths


def _find_delimiter(path: Path, lines: list[tuple[str, str]]) -> str:
    sample = lines[:100]
    for character in _DELIMITERS.values():
        counts = set()
        for where, line in sample:
            try:
                counts.add(len(split_line(where, line, character)))
            except DataSetError:
                counts.add(0)
        if counts in ({2}, {3}):
            return character
    raise DataSetError(
        f"{path}: no delimiter splits its first {len(sample)} lines into 2 or 3 fields each (`path label` or "
        f"`path num_frames label`), like {sample[0][1]!r}. Fix: put paths with spaces in double quotes, or give --delimiter"
    )


def _clip(where: str, line: str, delimiter: str, labels: dict[str, int], classes_file: Path, videos: Path) -> Clip:
    fields = split_line(where, line, delimiter)
    if len(fields) not in (2, 3) or not fields[0]:
        raise DataSetError(
            f"{where}: {len(fields)} fields: {line!r}. Fix: write `path label` or `path num_frames label`"
        )
    listed_frames = None
    if len(fields) == 3:
        if not fields[1].isdecimal():
            raise DataSetError(f"{where}: {fields[1]!r} is no number of frames: {line!r}. Fix: correct the line")
        listed_frames = int(fields[1])
    return Clip(videos / fields[0], _label(where, fields[-1], labels, classes_file), where, listed_frames)


def _label(where: str, text: str, labels: dict[str, int], classes_file: Path) -> int:
    try:
        number = int(text)
    except ValueError:
        return label_of(labels, text, where, classes_file)
    if not 0 <= number < len(labels):
        raise DataSetError(
            f"{where}: the label {number} is outside of 0 to {len(labels) - 1}, as {classes_file} has {len(labels)} classes. "
            "Fix: count labels from 0"
        )
    return number

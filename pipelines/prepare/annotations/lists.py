"""Lists of clips as text: the official TSM code's, mmaction2's, SlowFast's."""

from pathlib import Path

from pipelines.prepare.errors import DataSetError

from .base import Annotations, Clip, label_of, number_classes, read_lines, split_line

_DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "space": " "}
DELIMITER_NAMES = tuple(_DELIMITERS)


def read_lists(lists: dict[str, Path], classes_file: Path, videos: Path, delimiter: str | None = None) -> Annotations:
    """Lines `path label` or `path num_frames label`; a path is relative to `videos`, and a video or a folder of JPEG frames.

    A label is a number from 0 on, or a class's name. `classes_file`: one name a line, in the order of the numbers.
    `delimiter`: its name; without it, the one that cuts every line of the list into as many fields. A path that holds the
    delimiter stands in double quotes.
    """
    labels = number_classes(classes_file, [line for _, line in read_lines(classes_file)])
    splits = {}
    for split, path in lists.items():
        lines = read_lines(path)
        if not lines:
            raise DataSetError(f"{path}: the list is empty; give a line for each clip: path and label")
        character = _DELIMITERS[delimiter] if delimiter else _find_delimiter(path, lines)
        splits[split] = [_clip(where, line, character, labels, classes_file, videos) for where, line in lines]
    return Annotations(list(labels), splits)


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
        f"{path}: no delimiter cuts its first {len(sample)} lines into 2 or 3 fields each: `path label` or "
        f"`path num_frames label`, like {sample[0][1]!r}; put paths that hold spaces in double quotes, or give --delimiter"
    )


def _clip(where: str, line: str, delimiter: str, labels: dict[str, int], classes_file: Path, videos: Path) -> Clip:
    fields = split_line(where, line, delimiter)
    if len(fields) not in (2, 3) or not fields[0]:
        raise DataSetError(f"{where}: {len(fields)} fields, not `path label` or `path num_frames label`: {line!r}")
    listed_frames = None
    if len(fields) == 3:
        if not fields[1].isdecimal():
            raise DataSetError(f"{where}: {fields[1]!r} is no number of frames: {line!r}")
        listed_frames = int(fields[1])
    return Clip(videos / fields[0], _label(where, fields[-1], labels, classes_file), where, listed_frames)


def _label(where: str, text: str, labels: dict[str, int], classes_file: Path) -> int:
    try:
        number = int(text)
    except ValueError:
        return label_of(labels, text, where, classes_file)
    if not 0 <= number < len(labels):
        raise DataSetError(
            f"{where}: the label {number} is outside of 0 to {len(labels) - 1}, as {classes_file} has {len(labels)} classes; "
            "labels count from 0"
        )
    return number

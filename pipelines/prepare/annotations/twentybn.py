"""Something-Something v1 and v2 (Goyal et al., arXiv:1706.04261) and Jester, as TwentyBN and Qualcomm publish them."""

import json
from pathlib import Path
from typing import Any

from pipelines.manifest import UNLABELLED
from pipelines.prepare.errors import DataSetError

from .base import Annotations, Clip, first_file, label_of, number_classes, read_fields, read_lines, read_text
from .locate import entries_by_stem

Row = tuple[str, list[str]]
"""Where a line is, and its fields."""

_LIST_NAMES = {"train": "train", "val": "validation"}
CLASS_ORDERS = ("sorted", "file")


def read_twentybn_csv(name: str, annotations: Path, videos: Path, class_order: str = "sorted") -> Annotations:
    """Read `NAME-{labels,train,validation,test}.csv`; NAME is `something-something-v1` or `jester-v1`.

    Lines are `ID;class`. A clip is the folder of frames `videos/ID`, or a video of that name. `class_order` "sorted": by name,
    as in the official TSM code and its released networks; "file": as in the labels file, as in mmaction2.
    """
    labels_file = _find(annotations, name, "labels.csv")
    names = [line for _, line in read_lines(labels_file)]
    labels = number_classes(labels_file, sorted(names) if class_order == "sorted" else names)
    found = entries_by_stem(videos)

    def labelled(rows: list[Row]) -> list[Clip]:
        return [
            Clip(found.get(clip_id, videos / clip_id), label_of(labels, text, where, labels_file), where)
            for where, (clip_id, text) in map(_two_fields, rows)
        ]

    splits = {
        split: labelled(read_fields(_find(annotations, name, f"{list_name}.csv"), ";"))
        for split, list_name in _LIST_NAMES.items()
    }
    test_list = _find_test(annotations, name, "test.csv")
    rows = _test_answers(annotations) or (read_fields(test_list, ";") if test_list else [])
    if any(len(fields) > 1 for _, fields in rows):
        return Annotations(list(labels), splits | {"test": labelled(rows)})
    test, notes = _unlabelled([(where, fields[0]) for where, fields in rows], found, annotations, videos)
    return Annotations(list(labels), splits | test, notes)


def read_something_v2(annotations: Path, videos: Path) -> Annotations:
    """Read `something-something-v2-{labels,train,validation,test}.json`, or the same names without the data set's.

    The labels file maps each class to its number. A clip's class is its `template` without the brackets. Its video is
    `videos/ID.webm`, or a video with another suffix or a folder of frames of that name.
    """
    name = "something-something-v2"
    labels_file = _find(annotations, name, "labels.json")
    labels = _numbered_labels(labels_file)
    found = entries_by_stem(videos)

    def labelled(rows: list[Row]) -> list[Clip]:
        return [
            Clip(
                found.get(clip_id, videos / f"{clip_id}.webm"),
                label_of(labels, _without_brackets(text), where, labels_file),
                where,
            )
            for where, (clip_id, text) in rows
        ]

    splits = {
        split: labelled(_templates(_find(annotations, name, f"{list_name}.json")))
        for split, list_name in _LIST_NAMES.items()
    }
    classes = sorted(labels, key=labels.__getitem__)
    if answers := _test_answers(annotations):
        return Annotations(classes, splits | {"test": labelled(list(map(_two_fields, answers)))})
    test_list = _find_test(annotations, name, "test.json")
    ids = [(where, str(item["id"])) for where, item in _items(test_list, ("id",))] if test_list else []
    test, notes = _unlabelled(ids, found, annotations, videos)
    return Annotations(classes, splits | test, notes)


def _find(annotations: Path, name: str, ending: str) -> Path:
    return first_file(annotations, (f"{name}-{ending}", ending))


def _find_test(annotations: Path, name: str, ending: str) -> Path | None:
    return next((path for each in (f"{name}-{ending}", ending) if (path := annotations / each).is_file()), None)


def _test_answers(annotations: Path) -> list[Row]:
    """Return `ID;class` of each test clip; nothing if the answers were not published."""
    path = annotations / "test-answers.csv"
    return read_fields(path, ";") if path.is_file() else []


def _unlabelled(
    ids: list[tuple[str, str]], found: dict[str, Path], annotations: Path, videos: Path
) -> tuple[dict[str, list[Clip]], tuple[str, ...]]:
    """Return the test split, without labels, from the (where, ID) of its clips; or a note why there is none."""
    if not ids:
        return {}, (f"{annotations} has no test list, so the test split gets no manifest",)
    if not any(clip_id in found for _, clip_id in ids):
        return {}, (f"no clip of the test list is in {videos}, so the test split gets no manifest",)
    return {"test": [Clip(found.get(clip_id, videos / clip_id), UNLABELLED, where) for where, clip_id in ids]}, ()


def _two_fields(row: Row) -> Row:
    where, fields = row
    if len(fields) != 2 or not all(fields):
        raise DataSetError(f"{where}: {';'.join(fields)!r} is not `ID;class`. Fix: correct or remove the line")
    return where, fields


def _without_brackets(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataSetError(f"{path}, line {error.lineno}: not JSON ({error.msg}). Fix: download it again") from None
    if not isinstance(content, kind):
        raise DataSetError(
            f"{path}: holds a {type(content).__name__}, not a {kind.__name__}. Fix: check that it is the right file"
        )
    return content


def _numbered_labels(path: Path) -> dict[str, int]:
    try:
        labels = {_without_brackets(name): int(number) for name, number in _read_json(path, dict).items()}
    except (TypeError, ValueError) as error:
        raise DataSetError(f"{path}: a class's number is no number ({error}). Fix: download it again") from None
    if not labels or sorted(labels.values()) != list(range(len(labels))):
        raise DataSetError(
            f"{path}: {len(labels)} classes that are not numbered 0 to {len(labels) - 1}. Fix: download it again"
        )
    return labels


def _templates(path: Path) -> list[Row]:
    """Return (where, [ID, template]) of each entry of a list."""
    return [(where, [str(item["id"]), item["template"]]) for where, item in _items(path, ("id", "template"))]


def _items(path: Path, keys: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Return (where, entry) of each entry of a list. Raises DataSetError for one that lacks a key."""
    items = []
    for number, item in enumerate(_read_json(path, list), start=1):
        where = f"{path}, entry {number}"
        if not isinstance(item, dict) or any(key not in item for key in keys):
            raise DataSetError(
                f"{where}: has no {' or no '.join(keys)}: {item!r}. Fix: check that it is this data set's list"
            )
        items.append((where, item))
    return items

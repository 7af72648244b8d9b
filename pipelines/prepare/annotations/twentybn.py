"""Something-Something v1 and v2 (Goyal et al., arXiv:1706.04261) and Jester, as TwentyBN and Qualcomm publish them."""

import json
from pathlib import Path
from typing import Any

from pipelines.prepare.errors import DataSetError

from .base import Annotations, Clip, first_file, label_of, number_classes, read_fields, read_lines, read_text
from .locate import entries_by_stem

_LIST_NAMES = {"train": "train", "val": "validation", "test": "test"}
CLASS_ORDERS = ("sorted", "file")


def read_twentybn_csv(name: str, annotations: Path, videos: Path, class_order: str = "sorted") -> Annotations:
    """Read `NAME-{labels,train,validation,test}.csv`; NAME is `something-something-v1` or `jester-v1`.

    Lines are `ID;class`. A clip is the folder of frames `videos/ID`, or a video of that name. `class_order` "sorted": by name,
    as in the official TSM code and its released networks; "file": as in the labels file, as in mmaction2.
    """
    labels_file = _find(annotations, name, "labels.csv")
    names = [line for _, line in read_lines(labels_file)]
    labels = number_classes(labels_file, sorted(names) if class_order == "sorted" else names)
    found, splits, notes = entries_by_stem(videos), {}, []
    for split, list_name in _LIST_NAMES.items():
        rows = _test_answers(annotations) if split == "test" else None
        if rows is None and split == "test" and _has_no_labels(annotations, name):
            notes.append(f"the test list of {annotations} has no labels, so the test split gets no manifest")
            continue
        rows = rows or read_fields(_find(annotations, name, f"{list_name}.csv"), ";")
        splits[split] = [
            Clip(found.get(clip_id, videos / clip_id), label_of(labels, text, where, labels_file), where)
            for where, (clip_id, text) in map(_two_fields, rows)
        ]
    return Annotations(list(labels), splits, tuple(notes))


def read_something_v2(annotations: Path, videos: Path) -> Annotations:
    """Read `something-something-v2-{labels,train,validation,test}.json`, or the same names without the data set's.

    The labels file maps each class to its number. A clip's class is its `template` without the brackets. Its video is
    `videos/ID.webm`, or a video with another suffix or a folder of frames of that name.
    """
    name = "something-something-v2"
    labels_file = _find(annotations, name, "labels.json")
    labels = _numbered_labels(labels_file)
    found, splits, notes = entries_by_stem(videos), {}, []
    for split, list_name in _LIST_NAMES.items():
        if split == "test":
            rows = _test_answers(annotations)
            if rows is None:
                notes.append(f"{annotations} has no test-answers.csv, so the test split gets no manifest")
                continue
            answers = list(map(_two_fields, rows))
        else:
            answers = _templates(_find(annotations, name, f"{list_name}.json"))
        splits[split] = [
            Clip(
                found.get(clip_id, videos / f"{clip_id}.webm"),
                label_of(labels, _without_brackets(text), where, labels_file),
                where,
            )
            for where, (clip_id, text) in answers
        ]
    return Annotations(sorted(labels, key=labels.__getitem__), splits, tuple(notes))


def _find(annotations: Path, name: str, ending: str) -> Path:
    return first_file(annotations, (f"{name}-{ending}", ending))


def _has_no_labels(annotations: Path, name: str) -> bool:
    """Return whether the test list is missing, or lists only clips, as in the first release."""
    try:
        rows = read_fields(_find(annotations, name, "test.csv"), ";")
    except DataSetError:
        return True
    return all(len(fields) == 1 for _, fields in rows)


def _test_answers(annotations: Path) -> list[tuple[str, list[str]]] | None:
    path = annotations / "test-answers.csv"
    return read_fields(path, ";") if path.is_file() else None


def _two_fields(row: tuple[str, list[str]]) -> tuple[str, list[str]]:
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


def _templates(path: Path) -> list[tuple[str, list[str]]]:
    """Return (where, [ID, template]) of each entry of a list."""
    answers = []
    for number, item in enumerate(_read_json(path, list), start=1):
        where = f"{path}, entry {number}"
        if not isinstance(item, dict) or "id" not in item or "template" not in item:
            raise DataSetError(
                f"{where}: has no id or no template: {item!r}. Fix: check that it is this data set's list"
            )
        answers.append((where, [str(item["id"]), item["template"]]))
    return answers

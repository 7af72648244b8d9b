"""Kinetics-400, 600 and 700 (Kay et al., arXiv:1705.06950): DeepMind's CSV files, and videos as the usual downloaders name them."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from pipelines.prepare.errors import DataSetError

from .base import Annotations, Clip, label_of, number_classes, read_text
from .file_identity import first_three
from .locate import videos_by_stem

_SPLIT_WORDS = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}
_NEEDED = ("youtube_id", "time_start", "time_end")


def read_kinetics(annotations: Path, videos: Path) -> Annotations:
    """Read lines `label,youtube_id,time_start,time_end,split`; classes are sorted by name, the official order.

    Videos are `ID_SSSSSS_EEEEEE.*` (start and end in seconds, with or without leading zeros) anywhere below `videos`. Of two
    with the same name, take the one in the folder of its split or class. A test list without labels is skipped.
    """
    lists = {split: _find_list(annotations, split, words) for split, words in _SPLIT_WORDS.items()}
    for split in ("train", "val"):
        if lists[split] is None:
            raise DataSetError(
                f"{annotations} has no CSV file whose name ends in {' or '.join(_SPLIT_WORDS[split])}. "
                "Fix: download the annotations, or give their folder with --annotations"
            )
    rows = {split: list(_rows(path)) for split, path in lists.items() if path is not None}
    notes = []
    if "test" in rows and not all(row["label"] for _, row in rows["test"]):
        del rows["test"]
        notes.append(f"{lists['test']} has no labels, so the test split gets no manifest")
    found = videos_by_stem(videos)
    train_list = lists["train"]
    assert train_list is not None
    labels = number_classes(train_list, sorted({row["label"] for _, row in rows["train"]}))
    splits = {}
    for split, split_rows in rows.items():
        splits[split] = [
            Clip(_video(found, videos, split, row, where), label_of(labels, row["label"], where, train_list), where)
            for where, row in split_rows
        ]
    return Annotations(list(labels), splits, tuple(notes))


def _find_list(annotations: Path, split: str, words: tuple[str, ...]) -> Path | None:
    """Find `train.csv`, `kinetics_train.csv`, `kinetics-400_train.csv`, ...: the last word of the name names the split."""
    paths = [path for path in sorted(annotations.glob("*.csv")) if re.split(r"[^a-z]+", path.stem.lower())[-1] in words]
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise DataSetError(f"{annotations} has more than one list for {split} ({names}). Fix: keep one of them there")
    return paths[0] if paths else None


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True, skipinitialspace=True, restkey="more")
    missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise DataSetError(
            f"{path}, line 1: no column {', '.join(missing)}. Fix: download the list again: this is no list of Kinetics, "
            "or its header is missing"
        )
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if ("label" in row and not row["label"]) or any(not row[name] for name in _NEEDED):
                values = ",".join(str(field) for field in row.values())
                raise DataSetError(f"{where}: a field is missing: {values!r}. Fix: complete or remove the line")
            yield where, {"label": "", **row}
    except csv.Error as error:
        raise DataSetError(f"{path}, line {reader.line_num}: not CSV ({error}). Fix: check its quotes") from None


def _video(found: dict[str, list[Path]], videos: Path, split: str, row: dict[str, str], where: str) -> Path:
    """Return the video of a list's row; a missing one gets the name under which the scan reports it."""
    try:
        start_s, end_s = int(float(row["time_start"])), int(float(row["time_end"]))
    except ValueError:
        raise DataSetError(
            f"{where}: time_start {row['time_start']!r} or time_end {row['time_end']!r} is no number of seconds. "
            "Fix: correct or remove the line"
        ) from None
    padded, plain = f"{row['youtube_id']}_{start_s:06d}_{end_s:06d}", f"{row['youtube_id']}_{start_s}_{end_s}"
    paths = found.get(padded) or found.get(plain)
    if not paths:
        return videos / f"{padded}.mp4"
    if len(paths) == 1:
        return paths[0]
    fits = [_fit(path.relative_to(videos), split, row["label"]) for path in paths]
    if fits.count(max(fits)) > 1:
        twins = [str(path) for path, fit in zip(paths, fits, strict=True) if fit == max(fits)]
        raise DataSetError(f"{where}: more than one video matches: {first_three(twins)}. Fix: keep one of them")
    return paths[fits.index(max(fits))]


def _fit(path: Path, split: str, label: str) -> int:
    """Score how well a video's folders match its split and class."""
    folders = [_plain(part) for part in path.parent.parts]
    in_split = any(folder.split("_")[-1] in _SPLIT_WORDS[split] for folder in folders)
    return 2 * in_split + (_plain(label) in folders)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")

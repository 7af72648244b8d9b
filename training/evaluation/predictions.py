"""Write the predicted classes of clips as CSV: to read, and in the forms that the leaderboards of data sets take."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from runtime.atomic_write import atomic_write

from .metrics import ClipLogits

_TOP = 5


def write_predictions(path: Path, clip_logits: ClipLogits, classes: Sequence[str], names: Sequence[str]) -> None:
    """Write a line per clip: its name, its class if it has a label, and the best five classes with their softmax.

    A clip that could not be decoded has no classes.
    """
    score_NK = clip_logits.logit_NK.cpu().double().softmax(1)
    best_NV = _best(clip_logits)
    label_N = clip_logits.label_N.tolist() if clip_logits.labelled else None
    ranks = range(1, 1 + min(_TOP, len(classes)))
    head = ["clip", *([] if label_N is None else ["label"])]
    rows: list[list[Any]] = [head + [f"{what} {rank}" for rank in ranks for what in ("class", "score")]]
    for row, (name, seen) in enumerate(zip(names, clip_logits.seen_N.tolist(), strict=True)):
        known = [] if label_N is None else [classes[label_N[row]]]
        scored = [[classes[k], f"{float(score_NK[row, k]):.6f}"] for k in best_NV[row]] if seen else []
        rows.append([name, *known, *(text for pair in scored for text in pair)])
    _write(path, rows, ",")


def write_leaderboard(
    stem: Path, clip_logits: ClipLogits, classes: Sequence[str], names: Sequence[str]
) -> tuple[Path, Path]:
    """Write STEM.leaderboard_class.csv and STEM.leaderboard_top5.csv, without clips that could not be decoded.

    The lines are those of the official code: `ID;class name` for Something-Something v1 and Jester, and `ID;` with the numbers
    of the best five classes, the best first, for v2.
    """
    seen = clip_logits.seen_N.nonzero().flatten().tolist()
    ids, best_NV = clip_ids(names), _best(clip_logits)
    by_class, by_number = leaderboard_paths(stem)
    _write(by_class, ([ids[row], classes[best_NV[row][0]]] for row in seen), ";")
    _write(by_number, ([ids[row], *best_NV[row]] for row in seen), ";")
    return by_class, by_number


def leaderboard_paths(stem: Path) -> tuple[Path, Path]:
    """Return the files of `write_leaderboard`."""
    return stem.with_name(f"{stem.name}.leaderboard_class.csv"), stem.with_name(f"{stem.name}.leaderboard_top5.csv")


def clip_ids(names: Sequence[str]) -> list[str]:
    """Return the last parts of the clips' names, by which data sets identify them; whole names if two clips share one."""
    ids = [name.rpartition("/")[2] for name in names]
    return ids if len(set(ids)) == len(ids) else list(names)


def _best(clip_logits: ClipLogits) -> list[list[int]]:
    """Return each clip's best classes, the best first."""
    best_NK = clip_logits.logit_NK.cpu().argsort(dim=1, descending=True, stable=True)
    best_NV: list[list[int]] = best_NK[:, :_TOP].tolist()
    return best_NV


def _write(path: Path, rows: Iterable[Sequence[Any]], delimiter: str) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    with atomic_write(path) as file:
        # As in classes.txt: a folder's name, and so a class's, may be no valid Unicode.
        file.write(text.getvalue().encode(errors="backslashreplace"))

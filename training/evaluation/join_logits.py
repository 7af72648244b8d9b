"""Join saved logits of the same clips by the names of classes and clips, whatever manifests they were evaluated on.

Shapes: N clips of a file, U clips of any file, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pipelines.manifest import UNLABELLED
from training.build.class_names import positions_by_name
from training.errors import ConfigError

from .metrics import ClipLogits
from .saved_logits import Origin

_SHOWN = 3


@dataclass(frozen=True)
class Saved:
    """A file of saved logits."""

    path: Path
    clip_logits: ClipLogits
    origin: Origin


@dataclass(frozen=True)
class Joined:
    """Files of saved logits whose rows and columns mean the same clips and classes: those of the first file, in its order.

    Clips that only other files have come last.
    """

    parts: list[ClipLogits]
    """Of each file. A clip that a file lacks is not seen there."""
    clip_names: list[str] | None
    """None: unknown, so all files are of one manifest."""
    absent: list[str]
    """A line for each clip that a file lacks."""


def join_logits(files: Sequence[Saved]) -> Joined:
    """Bring the classes and clips of all files into one order. Raises ConfigError if they are not of the same clips."""
    first = files[0]
    for file in files[1:]:
        if file.origin.split != first.origin.split:
            raise ConfigError(
                f"evaluation.ensemble: {file.path} holds evaluation.split={file.origin.split}, {first.path} "
                f"{first.origin.split}. Fix: evaluate all runs on one split"
            )
    parts = [_in_class_order(file, first) for file in files]
    manifests = {file.origin.manifest_digest for file in files}
    names_by_file = [file.origin.clip_names for file in files]
    if len(manifests) == 1:
        return Joined(parts, next((names for names in names_by_file if names is not None), None), [])
    rows_by_file = [_rows_by_name(file, first) for file in files]
    union = list(dict.fromkeys(name for rows in rows_by_file for name in rows))
    if not set.intersection(*(set(rows) for rows in rows_by_file)):
        raise ConfigError(
            f"evaluation.ensemble: no clip is in all files. {_examples(files, rows_by_file)}. Clips are matched by name: the path "
            "of a clip's file or folder below the folder that holds all clips. Fix: evaluate all runs on the same clips; those "
            "of a prepare.py command keep their names in its shard, transcode and flow"
        )
    absent = [
        f"missing: {name} is not in {file.path}"
        for file, rows in zip(files, rows_by_file, strict=True)
        for name in union
        if name not in rows
    ]
    parts = [_spread(part, rows, union) for part, rows in zip(parts, rows_by_file, strict=True)]
    label_U = _common_labels(files, parts, union)
    return Joined([replace(part, label_N=label_U) for part in parts], union, absent)


def _in_class_order(file: Saved, first: Saved) -> ClipLogits:
    """Return a file's logits and labels with the classes in the first file's order."""
    positions = positions_by_name(file.origin.classes, first.origin.classes)
    if positions is None:
        ours, theirs = set(first.origin.classes), set(file.origin.classes)
        alone = sorted(theirs - ours)
        which, where = (alone[0], file.path) if alone else (min(ours - theirs), first.path)
        raise ConfigError(
            f"evaluation.ensemble: files of different classes: {which!r} is only in {where} ({len(theirs)} classes in "
            f"{file.path}, {len(ours)} in {first.path}). Fix: join evaluations of one data set"
        )
    position_K = torch.tensor(positions)
    label_of_K = position_K.argsort()
    logits, label_N = file.clip_logits, file.clip_logits.label_N
    known_N = label_of_K[label_N.clamp(min=0)]
    return replace(
        logits,
        logit_NK=logits.logit_NK[:, position_K],
        label_N=torch.where(label_N == UNLABELLED, label_N, known_N),
    )


def _rows_by_name(file: Saved, first: Saved) -> dict[str, int]:
    names = file.origin.clip_names
    if names is None:
        raise ConfigError(
            f"evaluation.ensemble: the files are of different manifests, and {file.path} does not say which clips it holds. Fix: "
            "evaluate that run again with evaluation.save_logits=true; or evaluate all runs on one manifest. If its clips are in "
            "shards, or transcoded, by an older version, first run that prepare.py command again, which names them"
        )
    rows = {name: row for row, name in enumerate(names)}
    if len(rows) < len(names):
        twice = next(name for row, name in enumerate(names) if rows[name] != row)
        raise ConfigError(
            f"evaluation.ensemble: {len(names) - len(rows)} clips of {file.path} have the name of another clip, such as "
            f"{twice!r}, so they cannot be found in {first.path if file is not first else 'the other files'}. "
            "Fix: evaluate all runs on one manifest, or give each clip its own name (without the suffix)"
        )
    return rows


def _spread(part: ClipLogits, rows: dict[str, int], union: list[str]) -> ClipLogits:
    """Move a file's clips to their rows in the union; the others are not seen, and have no label."""
    row_U = torch.tensor([rows.get(name, -1) for name in union])
    here_U = row_U >= 0
    logit_UK = torch.where(here_U[:, None], part.logit_NK[row_U.clamp(min=0)], 0)
    label_U = torch.where(here_U, part.label_N[row_U.clamp(min=0)], UNLABELLED)
    return ClipLogits(logit_UK, label_U, here_U & part.seen_N[row_U.clamp(min=0)])


def _common_labels(files: Sequence[Saved], parts: Sequence[ClipLogits], union: list[str]) -> Tensor:
    """Return the label of each clip. Raises ConfigError if two files disagree."""
    first, label_U = files[0], parts[0].label_N
    for file, part in zip(files[1:], parts[1:], strict=True):
        if file.clip_logits.labelled != first.clip_logits.labelled:
            with_labels, without = (file, first) if file.clip_logits.labelled else (first, file)
            raise ConfigError(
                f"evaluation.ensemble: {with_labels.path} has labels, {without.path} has none. Fix: prepare both data sets with "
                "the same annotations, and evaluate again"
            )
        other_U = (label_U != UNLABELLED) & (part.label_N != UNLABELLED) & (label_U != part.label_N)
        if other_U.any():
            row, classes = int(other_U.nonzero()[0]), first.origin.classes
            raise ConfigError(
                f"evaluation.ensemble: {int(other_U.sum())} clips have other labels in {file.path}, such as {union[row]!r}: "
                f"{classes[part.label_N[row]]!r} there, {classes[label_U[row]]!r} in a file before it. Fix: prepare both data sets "
                "with the same annotations, and evaluate again"
            )
        label_U = torch.where(label_U == UNLABELLED, part.label_N, label_U)
    return label_U


def _examples(files: Sequence[Saved], rows_by_file: Sequence[dict[str, int]]) -> str:
    return "; ".join(
        f"{file.path}: {', '.join(list(rows)[:_SHOWN])} ..." for file, rows in zip(files, rows_by_file, strict=True)
    )

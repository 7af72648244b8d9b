"""Match the classes of weights with those of data by name: the number of a class depends on who prepared the data set."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from pipelines.manifest import Manifest, ManifestError
from runtime import run_layout
from runtime.checkout import CHECKOUT
from training.errors import ConfigError

CLASSIFIER = "classifier."
"""Prefix of the tensors that have a row per class."""
UNNAMED = "the weights have no class names: classes matched by number"
REORDERED = "classes mapped by name"


def lines_of(classes: Sequence[str]) -> bytes:
    """Return the content of the run folder's classes.txt: one name per line, in the order of the labels."""
    # A folder's name, and so a class's, may be no valid Unicode.
    return "".join(f"{name}\n" for name in classes).encode(errors="backslashreplace")


def digest_of(classes: Sequence[str]) -> str:
    """Return the sha256 of classes.txt."""
    return hashlib.sha256(lines_of(classes)).hexdigest()


def positions_by_name(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """Return for each of our classes its position among theirs, or None unless both have the same names."""
    position_of = {name: position for position, name in enumerate(theirs)}
    if len(theirs) != len(ours) or position_of.keys() != set(ours):
        return None
    return [position_of[name] for name in ours]


def reordered(tensors: Mapping[str, Tensor], positions: list[int]) -> dict[str, Tensor]:
    """Reorder the classifier's rows: row k of the result is row `positions[k]`, so that logits come in the new order."""
    return {name: tensor[positions] if name.startswith(CLASSIFIER) else tensor for name, tensor in tensors.items()}


def first_difference(ours: Sequence[str], where: str, theirs: Sequence[str], elsewhere: str) -> str:
    """Name the first class that differs between two lists, which must not be equal."""
    for label, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            return f"class {label} is {our!r} in {where}, {their!r} in {elsewhere}"
    if len(ours) > len(theirs):
        return (
            f"class {len(theirs)} is {ours[len(theirs)]!r} in {where}, and {elsewhere} has only {len(theirs)} classes"
        )
    return f"class {len(ours)} is {theirs[len(ours)]!r} in {elsewhere}, and {where} has only {len(ours)} classes"


def matched(
    tensors: Mapping[str, Tensor], theirs: Sequence[str] | None, whose: str, manifest: Manifest
) -> tuple[dict[str, Tensor], str]:
    """Give a trained network's tensors the class order of the data that it is evaluated on.

    `theirs`: the classes it was trained on, None: unknown; `whose` names it. Returns a note for the result, empty if
    the classes are the same. Raises ConfigError if their names are others.
    """
    if theirs is None:
        return dict(tensors), UNNAMED
    positions = positions_by_name(theirs, manifest.classes)
    if positions is None:
        difference = first_difference(manifest.classes, str(manifest.path), theirs, whose)
        raise ConfigError(
            f"{whose} has other classes than the data: {difference}. Fix: evaluate on a data set with the same class names, or "
            "train on this one from these weights (model.init=CHECKPOINT)"
        )
    same = list(theirs) == manifest.classes
    return (dict(tensors), "") if same else (reordered(tensors, positions), REORDERED)


def checkpoint_classes(state: Mapping[str, Any], run: Path, training_manifest: Path | None = None) -> list[str] | None:
    """Return the class names of a checkpoint, by its `state` and the folder of its run; None: unknown.

    Older checkpoints hold no names, only the digest of their training manifest. If that manifest is still where the run's
    config.yaml says, or is `training_manifest`, it has the names.
    """
    if "classes" in state:
        return list(state["classes"])
    digest = state.get("recipe", {}).get("manifest_digest")
    for path in filter(None, (_manifest_of(run), training_manifest)):
        try:
            manifest = Manifest.open(path)
        except ManifestError:
            continue
        if manifest.digest == digest and manifest.is_as_written():
            return manifest.classes
    return None


def _manifest_of(run: Path) -> Path | None:
    """Return the path of the training manifest in a run's config.yaml, if it can be read."""
    try:
        data = OmegaConf.load(run / run_layout.CONFIG).data
        return CHECKOUT / data.root / data.train
    except (OSError, YAMLError, OmegaConfBaseException, AttributeError, TypeError):
        return None

"""Save the logits of an evaluation, and load them to score them again or average them (training/evaluation/ensemble.py)."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from runtime.atomic_write import atomic_write
from training.build.class_names import digest_of
from training.errors import ConfigError

from .metrics import ClipLogits, Scores, confusion_matrix


@dataclass(frozen=True)
class Origin:
    """Source of saved logits."""

    manifest_digest: str
    """Identifies the clips and their order."""
    classes: list[str]
    order_groups: list[int] | None
    """As in the manifest."""
    run_id: str
    step: int
    recipe: str
    """Fingerprint of the recipe that trained the weights, or hash of their file."""
    protocol: str
    """Name of the evaluation protocol."""
    amp: str = "off"
    """evaluation.amp."""
    differs_from_run: dict[str, Any] = field(default_factory=dict)
    """Settings of the evaluation that are not the run's, by key: {here, trained}."""


def save_logits(folder: Path, clip_logits: ClipLogits, origin: Origin, scores: Scores) -> Path:
    """Write NAME.safetensors, and to read NAME.json (scores) and NAME.confusion.csv. Returns the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{origin.step:08d}-{origin.protocol}{'' if origin.amp == 'off' else f'-{origin.amp}'}"
    path = folder / f"{name}.safetensors"
    tensors = {key: tensor.cpu().contiguous() for key, tensor in vars(clip_logits).items()}
    with atomic_write(path) as file:
        file.write(save(tensors, metadata={"tsm_logits": json.dumps(vars(origin))}))
    missing_rows = (~tensors["seen_N"]).nonzero().flatten().tolist()
    fields = {key: value for key, value in vars(origin).items() if key not in ("classes", "order_groups")}
    fields["classes_sha256"] = digest_of(origin.classes)
    summary = {**fields, "scores": scores.as_dict(), "missing_rows": missing_rows}
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    with (folder / f"{name}.confusion.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label \\ answer", *origin.classes])
        for label, row_K in zip(origin.classes, confusion_matrix(clip_logits).tolist(), strict=True):
            writer.writerow([label, *row_K])
    return path


def load_logits(path: Path) -> tuple[ClipLogits, Origin]:
    """Load a file of `save_logits`. Raises ConfigError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            origin = Origin(**json.loads((file.metadata() or {})["tsm_logits"]))
            keys = list(file.keys())
            clip_logits = ClipLogits(**{key: file.get_tensor(key) for key in keys})
    except FileNotFoundError:
        raise ConfigError(
            f"evaluation.ensemble: {path}: no such file. Fix: name files of a run's logits folder"
        ) from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"evaluation.ensemble: {path} does not hold saved logits ({error}). "
            "Fix: name files that evaluate.py wrote with evaluation.save_logits=true"
        ) from error
    return clip_logits, origin

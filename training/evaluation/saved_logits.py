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

from .metrics import ClipLogits, Counts, confusion_matrix
from .predictions import leaderboard_paths, write_leaderboard, write_predictions


@dataclass(frozen=True)
class Origin:
    """Source of saved logits. Files of older versions lack the fields from `amp` on, which then have their defaults."""

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
    split: str = "val"
    """evaluation.split."""
    clip_names: list[str] | None = None
    """Name of each clip (pipelines.clip_names); None: unknown."""
    members: list[dict[str, Any]] = field(default_factory=list)
    """Of an ensemble: source and weight of each file."""

    @property
    def file_name(self) -> str:
        """Name of the file, without a suffix."""
        parts = [f"step-{self.step:08d}", self.protocol] if not self.members else [self.protocol]
        parts += [self.amp] if self.amp != "off" else []
        return "-".join([*parts, *([self.split] if self.split != "val" else [])])


def save_logits(folder: Path, clip_logits: ClipLogits, origin: Origin, counts: Counts) -> Path:
    """Write NAME.safetensors, and to read NAME.json (scores), NAME.predictions.csv and, of labelled clips, NAME.confusion.csv.

    Clips without names have no predictions.csv. Returns the path of the first file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{origin.file_name}.safetensors"
    tensors = {key: tensor.cpu().contiguous() for key, tensor in vars(clip_logits).items()}
    with atomic_write(path) as file:
        file.write(save(tensors, metadata={"tsm_logits": json.dumps(vars(origin))}))
    missing_rows = (~tensors["seen_N"]).nonzero().flatten().tolist()
    fields = {key: value for key, value in vars(origin).items() if key not in ("classes", "order_groups", "clip_names")}
    fields["classes_sha256"] = digest_of(origin.classes)
    summary = {**fields, "scores": counts.as_dict(), "missing_rows": missing_rows}
    if origin.clip_names is not None:
        summary["missing_clips"] = [origin.clip_names[row] for row in missing_rows]
        predictions = path.with_name(f"{origin.file_name}.predictions.csv")
        write_predictions(predictions, clip_logits, origin.classes, origin.clip_names)
    path.with_name(f"{origin.file_name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    if clip_logits.labelled:
        _write_confusion(path.with_name(f"{origin.file_name}.confusion.csv"), clip_logits, origin.classes)
    return path


def _write_confusion(path: Path, clip_logits: ClipLogits, classes: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label \\ answer", *classes])
        for label, row_K in zip(classes, confusion_matrix(clip_logits).tolist(), strict=True):
            writer.writerow([label, *row_K])


def save_results(folder: Path, clip_logits: ClipLogits, origin: Origin, counts: Counts, max_bad_clips: int) -> None:
    """Save the logits, of test clips also the leaderboards' files, and print the paths.

    A leaderboard expects every clip. With more missing ones than `max_bad_clips` its files are not written.
    """
    path = save_logits(folder, clip_logits, origin, counts)
    print(f"saved: {path}", flush=True)
    if origin.split != "test" or origin.clip_names is None:
        return
    stem = path.with_name(origin.file_name)
    if counts.missing <= max_bad_clips:
        for file in write_leaderboard(stem, clip_logits, origin.classes, origin.clip_names):
            print(f"saved: {file}", flush=True)
        return
    for file in leaderboard_paths(stem):
        # Of an earlier evaluation.
        file.unlink(missing_ok=True)
    print(
        f"not saved: the leaderboard's files, because {counts.missing} clips have no prediction. Fix: repair these clips, or "
        f"leave them out with data.max_bad_clips={counts.missing}",
        flush=True,
    )


def load_logits(path: Path) -> tuple[ClipLogits, Origin]:
    """Load a file of `save_logits`. Raises ConfigError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            origin = Origin(**json.loads((file.metadata() or {})["tsm_logits"]))
            keys = list(file.keys())
            clip_logits = ClipLogits(**{key: file.get_tensor(key) for key in keys})
        if origin.clip_names is not None and len(origin.clip_names) != len(clip_logits.label_N):
            raise ValueError(f"{len(origin.clip_names)} names of {len(clip_logits.label_N)} clips")
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

"""The model card: a JSON file beside an exported model with all that an application needs to use it (docs/export.md)."""

import hashlib
from collections.abc import Mapping
from typing import Any

from training.build.class_names import digest_of
from training.build.normalise import MEAN_C, STD_C
from training.deploy.frame_interval import frames_of
from training.deploy.load import TrainedRun
from training.report.stream import read_stream
from training.runs.run_folder import RunFolder
from training.telemetry.records import read_metrics

from .forms import Exportable

SCHEMA = "tsm-model-card/1"
CARD = "model.json"

# Fields of an evaluation's record that say nothing of the weights' accuracy, or that the card has elsewhere.
_NO_ACCURACY = ("kind", "time_s", "duration_s", "epoch", "source", "classes_sha256", "early")


def card_of(
    run: TrainedRun,
    network: Exportable,
    kind: Mapping[str, str],
    files: Mapping[str, bytes],
    check: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Return the card. `kind`: format, precision and form; `check`: the result of the run against PyTorch."""
    protocol = run.protocol
    shorter_side = min(protocol.scaled_size(1000, 1000))
    caches = enumerate(network.cache_modules)
    return {
        "schema": SCHEMA,
        **kind,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
        "run": {"name": run.name, "step": run.step, "recipe": run.fingerprint, "backbone": run.config.model.backbone},
        "classes": run.classes,
        "classes_sha256": digest_of(run.classes),
        "pixels": {
            "colour": "RGB" if network.modality == "rgb" else network.modality,
            "range": [0, 255],
            "mean": list(MEAN_C[network.modality]),
            "std": list(STD_C[network.modality]),
            "resize": {"shorter_side": shorter_side, "filter": "bilinear, antialiased", "crop": "centre"},
            "size": network.size,
        },
        "frames": frames_of(run.config),
        "inputs": _tensors(network.inputs),
        "outputs": _tensors(network.outputs),
        "caches": [
            {"input": f"cache_{index}", "output": f"next_cache_{index}", "initial": 0.0, "module": module}
            for index, module in caches
        ],
        "check": dict(check),
        "accuracy": accuracy_of(RunFolder(run.folder), run.step),
        "data": {"name": run.config.data.name, "train_manifest_sha256": run.recipe.get("manifest_digest", "")},
        "licence": {
            "code": "Apache-2.0",
            "weights": f"not stated by the export; the terms of the data set {run.config.data.name} may bind them",
        },
        "notes": run.notes,
        "made_with": dict(versions),
    }


def accuracy_of(folder: RunFolder, step: int) -> list[dict[str, Any]]:
    """Return the evaluations of these weights: those in the run's metrics.jsonl, then that on a stream (stream.json)."""
    records = read_metrics(folder.metrics) if folder.metrics.exists() else []
    of_clips = [
        {key: value for key, value in record.items() if key not in _NO_ACCURACY}
        for record in records
        if record.get("kind") == "evaluation" and record["step"] == step
    ]
    on_stream = read_stream(folder.stream)
    if on_stream is None or on_stream["step"] != step:
        return of_clips
    kept = {key: value for key, value in on_stream.items() if key not in _NO_ACCURACY}
    rows = [{key: value for key, value in row.items() if key != "early_percent"} for row in on_stream["stream"]]
    return [*of_clips, kept | {"stream": rows}]


def _tensors(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    return [{"name": name, "shape": ["N", *shape], "dtype": "float32"} for name, shape in shapes.items()]

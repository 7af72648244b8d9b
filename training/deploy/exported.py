"""Load an exported ONNX network for predictions and streams: its folder (`model.onnx`, `model.json`) is enough.

It computes in ONNX Runtime, on the CPU. Frames are chosen, scaled and normalised as for the run it came from.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distributed.backends.single import SingleBackend
from pipelines.stream.eval_views import EvalProtocol
from runtime.checkout import CHECKOUT
from training.build.data import protocol_of
from training.build.normalise import MEAN_C, STD_C
from training.config.compose import CONF, composed
from training.config.load import from_composed
from training.config.schema import Config
from training.errors import ConfigError
from training.evaluation.run_config import flat
from tsm.streaming import Caches

from .export.card import CARD, SCHEMA
from .load import ALONE, TrainedRun, load_trained, require_rgb

# Fields of the card that are read here.
_NEEDED = "format form precision files run classes pixels frames inputs caches data notes".split()

# What an override may change: the card fixes everything else.
_OPEN = ("evaluation.", "pipeline.workers", "pipeline.decoder", "data.retry_s", "data.frame_rate")


def load_run_or_export(named: str, overrides: Sequence[str] = ()) -> TrainedRun[Any]:
    """Load a run (`load_trained`), or an exported network if `named` is a folder with a model card. Raises ConfigError."""
    # As a run is found: from the working directory or, if nothing is there, from the checkout. os.path: a name may be too long.
    for base in (Path.cwd(), CHECKOUT):
        if os.path.isfile(base / named / CARD):  # noqa: PTH113
            return load_exported(base / named, overrides)
    return load_trained(named, overrides)


def load_exported(folder: Path, overrides: Sequence[str] = ()) -> "TrainedRun[OnnxNetwork]":
    """Load the ONNX network in this folder. `overrides`: of the evaluation protocol and of decoding. Raises ConfigError."""
    card = _read_card(folder)
    require_rgb(str(folder), "rgb" if card["pixels"]["colour"] == "RGB" else "flow")
    config = _config_of(card, overrides)
    network = OnnxNetwork(_open(folder, card), card)
    protocol = protocol_of(config.model, config.pipeline, config.evaluation)
    _check_input(card, protocol)
    run = card["run"]
    notes = [f"exported from {run['name']}: {card['format']}, {card['precision']}, {card['form']}", *card["notes"]]
    backend = SingleBackend(ALONE, torch.device("cpu"))
    return TrainedRun(folder.absolute(), config, network.eval(), card["classes"], run["step"], {}, backend, notes)


class OnnxNetwork(nn.Module):
    """Maps clips (N, T, 3, H, W) to their mean logits in ONNX Runtime, and frames of streams if its form is `stream`."""

    def __init__(self, session: Any, card: dict[str, Any]) -> None:
        super().__init__()
        self._session, self._caches = session, card["caches"]
        self.form: str = card["form"]
        self._shape_of = {each["name"]: each["shape"][1:] for each in card["inputs"]}
        # Tells the dtype of logits; the session has the weights.
        self.dtype = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x_NTCHW: Tensor) -> Tensor:
        if self.form == "clip":
            return torch.from_numpy(self._session.run(["logits"], {"clip": x_NTCHW.float().numpy()})[0])
        logits, caches = [], self.initial_caches(len(x_NTCHW))
        for frame_NCHW in x_NTCHW.unbind(1):
            logit_NK, caches = self.stream(frame_NCHW, caches)
            logits.append(logit_NK)
        return torch.stack(logits).mean(0)

    def initial_caches(self, batch: int) -> Caches:
        """Return the caches before the first frame of `batch` streams, as StreamingNetwork does."""
        return tuple(torch.full((batch, *self._shape_of[each["input"]]), each["initial"]) for each in self._caches)

    def stream(self, x_NCHW: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
        """Return the logits of a frame of each stream, and the caches for the next ones, as StreamingNetwork does."""
        named = {each["input"]: cache.numpy() for each, cache in zip(self._caches, caches, strict=True)}
        outputs = ["logits", *(each["output"] for each in self._caches)]
        results = self._session.run(outputs, {"frame": x_NCHW.float().contiguous().numpy(), **named})
        logit_NK, *kept = map(torch.from_numpy, results)
        return logit_NK, tuple(kept)


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    try:
        card: dict[str, Any] = json.loads(path.read_text())
        schema = card["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no model card ({error!r}). Fix: export the run again with export.py") from error
    if schema != SCHEMA:
        raise ConfigError(
            f"{path} has the schema {schema}, and this version reads {SCHEMA}. Fix: export the run again with export.py"
        )
    if missing := [key for key in _NEEDED if key not in card]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}. Fix: export the run again with export.py")
    if card["format"] != "onnx":
        raise ConfigError(
            f"{folder} has the format {card['format']}, and predict.py and stream.py read onnx. "
            "Fix: python export.py RUN format=onnx, or give the run folder"
        )
    return card


def _open(folder: Path, card: dict[str, Any]) -> Any:
    """Return ONNX Runtime's session for the file that the card describes."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"{folder} needs ONNX Runtime ({error}). Fix: pip install -c constraints.txt onnxruntime (of the extra `onnx`), or "
            "give the run folder"
        ) from error
    path = folder / "model.onnx"
    try:
        model = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. Fix: copy the whole folder of the export") from error
    if hashlib.sha256(model).hexdigest() != card["files"][path.name]["sha256"]:
        raise ConfigError(f"{path} is not the file that {CARD} describes. Fix: copy both from one export again")
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def _config_of(card: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Return the configuration that the card implies, with the overrides. Raises ConfigError for those that it cannot take."""
    data, frames = card["data"]["name"], card["frames"]
    base = composed(
        [
            # The words of classes that mirroring exchanges. A user's own data set has the default's.
            *([f"data={data}"] if (CONF / "data" / f"{data}.yaml").is_file() else []),
            f"data.num_classes={len(card['classes'])}",
            f"model.num_frames={frames['num_frames']}",
            f"pipeline.size={card['pixels']['size']}",
            f"pipeline.sampling={frames['sampling']}",
            *([f"pipeline.distances={frames['distances']}"] if frames["sampling"] == "stream" else []),
            # Cards of older versions have no frame rate.
            f"data.frame_rate={'null' if (rate := frames.get('frame_rate')) is None else rate}",
            # For training only; the default does not fit every number of frames, or there is none.
            "pipeline.loss_from=1",
            "batch.global_batch=1",
            "distributed=single",
            "distributed.device=cpu",
        ]
    )
    fixed, config = flat(from_composed(base)), from_composed(composed(overrides, base))
    for key, value in flat(config).items():
        if value != fixed.get(key) and (not key.startswith(_OPEN) or key == "evaluation.amp"):
            raise ConfigError(
                f"{key}={value} cannot be applied to an exported network, which has {fixed.get(key)}. Fix: leave it out, or give "
                "the run folder"
            )
    return config


def _check_input(card: dict[str, Any], protocol: EvalProtocol) -> None:
    """Raise ConfigError if this version, or the protocol, gives another input than the network was exported for."""
    pixels = card["pixels"]
    if protocol.side != pixels["size"]:
        raise ConfigError(
            f"the protocol {protocol.name} has frames of {protocol.side} px, and the network was exported for {pixels['size']} px. "
            "Fix: evaluation.full_resolution=false"
        )
    wanted = ([*MEAN_C["rgb"]], [*STD_C["rgb"]], min(protocol.scaled_size(1000, 1000)))
    if (pixels["mean"], pixels["std"], pixels["resize"]["shorter_side"]) != wanted:
        raise ConfigError(
            f"the card's mean, std and resize rule are not those of this version, {wanted}. Fix: export the run again with "
            "export.py"
        )

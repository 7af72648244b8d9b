"""Find and load the initial weights of a run: random, torchvision's ImageNet weights, a file, or a checkpoint folder.

Only rank 0 reads. Nothing is downloaded, and no code in a file is executed.
"""

import hashlib
import json
import pickle
import re
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distributed.checkpoint.store import STATE_FILE, CheckpointError, load_checkpoint
from training.config.schema import ModelConfig
from training.errors import ConfigError
from tsm.modality import INPUT_CHANNELS, first_convolution, flow_weight
from tsm.networks import TemporalNetwork
from tsm.official import WeightsError, check_keys, from_official, tensors_in, trained_with

from .class_names import (
    CLASSIFIER,
    REORDERED,
    UNNAMED,
    checkpoint_classes,
    first_difference,
    positions_by_name,
    reordered,
)

RANDOM, IMAGENET = "random", "imagenet"
TEMPORAL_SETTINGS = ("shift", "direction", "fold_div", "temporal_pool")
"""Keys of ModelConfig that change the network's function without changing its tensors.

`num_frames` is not one: a TSN is often evaluated with more frames than it was trained with."""

# In a checkpoint written by this project.
_NETWORK_FILE = "network.safetensors"
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class InitialWeights:
    """Identity and location of initial weights. The identity is part of the recipe: `random`, or `sha256:...` of the file."""

    identity: str
    path: Path | None = None


class WeightsMissing(ConfigError):
    """torchvision's weights are not in torch hub's cache."""


def find_initial_weights(model: ModelConfig, checkout: Path, resumed_from: str | None) -> InitialWeights:
    """Find and identify what `model.init` names, without parsing it. A relative path starts in the checkout.

    `resumed_from`: the identity in the checkpoint that a run resumes from, None for a new run. A resumed run does not need
    the file: if it is gone, the identity is the checkpoint's.

    Raises ConfigError, with the fix, if a new run's file does not exist or has another sha256 than configured.
    """
    if model.init == RANDOM:
        return InitialWeights(RANDOM)
    path = _imagenet_path(model.backbone) if model.init == IMAGENET else checkout / Path(model.init).expanduser()
    file = path / _NETWORK_FILE if path.is_dir() else path
    if resumed_from not in (None, RANDOM) and (model.init_sha256 or not file.is_file()):
        return InitialWeights(f"sha256:{model.init_sha256}" if model.init_sha256 else str(resumed_from))
    if not file.is_file():
        raise (WeightsMissing if model.init == IMAGENET else ConfigError)(_not_there(model, path))
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"model.init={model.init}: cannot read {file}: {error.strerror}. Fix: its permissions"
        ) from error
    if resumed_from is None:
        _check_digest(model, file, digest)
    return InitialWeights(f"sha256:{digest}", path)


def load_initial_weights(
    network: TemporalNetwork, model: ModelConfig, initial: InitialWeights, classes: Sequence[str] | None = None
) -> str:
    """Load the weights into a network, in place, and return a summary in one line. `classes`: names of the network's classes.

    The classifier stays new if the file's is for other classes, or for ImageNet's. If the same classes have another order,
    its rows are reordered. Non-local blocks, which start as the identity, stay new if the file has none. A flow network's first
    convolution is made from an ImageNet network's. Every other tensor must be in the file and have the right shape.

    Raises ConfigError that names the file, the tensors and the fix.
    """
    if initial.path is None:
        return "random" + ("; model.partial_bn keeps all batch norms but the first at them" if model.partial_bn else "")
    saved, trained_as = _read(model.init, initial.path)
    expected = network.state_dict()
    try:
        translated, of_images = from_official(saved), "fc.weight" in saved or "classifier.1.weight" in saved
        translated, flow_note = _for_modality(translated, network, model, of_images)
        new = _left_new(translated, expected, of_images)
        translated, class_note = _by_class_name(translated, saved_classes(initial.path), classes, new)
        rest = {name: tensor for name, tensor in translated.items() if not name.startswith(tuple(new))}
        check_keys(rest, {name: tensor for name, tensor in expected.items() if not name.startswith(tuple(new))})
    except WeightsError as error:
        raise ConfigError(
            f"model.init={model.init} does not fit model.backbone={model.backbone}: {error}. Fix: set model.backbone and "
            "model.non_local to those of the file, or choose another file"
        ) from error
    network.load_state_dict(rest, strict=False)
    parts = [
        f"{model.init} ({initial.identity[:15]}...): {len(rest)} tensors taken",
        *filter(None, [flow_note, *new.values(), class_note]),
    ]
    if model.partial_bn and any("non_local" in part for part in new.values()):
        parts.append("model.partial_bn freezes their batch norms, so they stay the identity")
    for key, then in trained_as.items():
        now = getattr(model, key, then)
        if now != then:
            parts.append(f"they were trained with model.{key}={then}, it is {now} here")
    return "; ".join(parts)


def saved_classes(path: Path) -> list[str] | None:
    """Return the class names of a checkpoint, or of the network's file in one; None: unknown, as for any other file."""
    if not path.is_dir() and path.name != _NETWORK_FILE:
        return None
    state = saved_state(path)
    # CHECKPOINTS/step-XXXXXXXX in the run folder; `best` is a link to such a folder.
    return None if state is None else checkpoint_classes(state, _folder_of(path).resolve().parent.parent)


def saved_state(path: Path) -> dict[str, Any] | None:
    """Return the state beside a file of weights, or in a checkpoint's folder; None if there is none."""
    try:
        return dict(json.loads((_folder_of(path) / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _for_modality(
    translated: dict[str, Tensor], network: TemporalNetwork, model: ModelConfig, of_images: bool
) -> tuple[dict[str, Tensor], str]:
    """Give the first convolution a weight for the network's modality. Returns the tensors and a note for the log.

    Raises ConfigError if the file is of a network for another modality, and not one for images.
    """
    name = f"backbone.{first_convolution(network.backbone)[0]}.weight"
    channels = translated[name].shape[1] if name in translated and translated[name].dim() == 4 else None
    theirs = next((modality for modality, count in INPUT_CHANNELS.items() if count == channels), network.modality)
    if theirs == network.modality:
        return translated, ""
    if of_images and network.modality == "flow":
        note = f"{name.removesuffix('.weight')} takes the mean of the file's over RGB"
        return translated | {name: flow_weight(translated[name])}, note
    others = "model.init=imagenet, " if network.modality == "flow" else ""
    raise ConfigError(
        f"model.init={model.init} is of a network for {theirs} ({channels} input channels), and model.modality={network.modality} "
        f"has {network.in_channels}. Fix: {others}the file of a network for {network.modality}, or model.modality={theirs}"
    )


def _by_class_name(
    translated: dict[str, Tensor], theirs: Sequence[str] | None, ours: Sequence[str] | None, new: dict[str, str]
) -> tuple[dict[str, Tensor], str]:
    """Give the classifier the rows of our classes. Returns the tensors and a note for the log.

    A classifier of other classes is added to `new`, the tensors that stay new.
    """
    if CLASSIFIER in new or ours is None or "classifier.weight" not in translated:
        return translated, ""
    if theirs is None:
        return translated, UNNAMED
    positions = positions_by_name(theirs, ours)
    if positions is None:
        difference = first_difference(ours, "the data", theirs, "the file")
        new[CLASSIFIER] = f"classifier left new ({difference})"
    elif list(theirs) != list(ours):
        return reordered(translated, positions), f"{REORDERED}: the rows of the classifier were reordered"
    return translated, ""


def _left_new(translated: Mapping[str, Tensor], expected: Mapping[str, Tensor], of_images: bool) -> dict[str, str]:
    """Return name prefixes of the tensors that the file does not provide, each with the reason for the log."""
    new: dict[str, str] = {}
    theirs, ours = translated.get("classifier.weight"), expected["classifier.weight"]
    if theirs is not None and len(theirs) != len(ours):
        new[CLASSIFIER] = f"classifier left new ({len(ours)} classes, the file has {len(theirs)})"
    elif theirs is not None and of_images and len(theirs) == _IMAGENET_CLASSES:
        new[CLASSIFIER] = "classifier left new (the file's is for ImageNet's classes)"
    blocks = sorted({name.split("non_local.")[0] + "non_local." for name in expected if ".non_local." in name})
    if blocks and not any(".non_local." in name for name in translated):
        new |= dict.fromkeys(blocks, "")
        new[blocks[0]] = f"{len(blocks)} non_local blocks left new"
    return new


def _imagenet_path(backbone: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _imagenet_url(backbone).rsplit("/", 1)[1]


def _imagenet_url(backbone: str) -> str:
    url: str = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    return url


def _not_there(model: ModelConfig, path: Path) -> str:
    alternatives = "model.init=FILE for other weights, or model.init=random"
    if model.init == IMAGENET:
        url = _imagenet_url(model.backbone)
        return (
            f"model.init=imagenet needs torchvision's weights of {model.backbone} in {path}; a job downloads nothing. "
            f"Fix: mkdir -p {shlex.quote(str(path.parent))} && curl -fL -o {shlex.quote(str(path))} {url} "
            f"(without a network: on a machine that has one, then copy the file); or {alternatives}"
        )
    if path.is_dir():
        steps = sorted([*path.glob("step-*"), *path.glob("checkpoints/step-*")])
        hint = f"model.init={steps[-1]}" if steps else "model.init=outputs/RUN/checkpoints/step-XXXXXXXX"
        return f"model.init={model.init}: {path} is not a checkpoint, it has no {_NETWORK_FILE}. Fix: {hint}, or {alternatives}"
    return (
        f"model.init={model.init}: {path} does not exist. Fix: {alternatives}; a relative path starts in the checkout"
    )


def _check_digest(model: ModelConfig, file: Path, digest: str) -> None:
    if model.init_sha256 is not None and digest != model.init_sha256:
        raise ConfigError(
            f"model.init={model.init}: {file} has the sha256 {digest}, but model.init_sha256={model.init_sha256}. "
            "Fix: fetch the file again, or correct model.init_sha256"
        )
    prefix = re.search(r"-([0-9a-f]{8,})\.", file.name)
    if model.init == IMAGENET and prefix and not digest.startswith(prefix[1]):
        raise ConfigError(
            f"model.init=imagenet: {file} is not what its name says: its sha256 is {digest}. "
            f"Fix: rm {shlex.quote(str(file))}, then curl -fL -o {shlex.quote(str(file))} {_imagenet_url(model.backbone)}"
        )


def _read(init: str, path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return the tensors by the file's names, and the ModelConfig settings that they were trained with, as far as known."""
    try:
        if path.is_dir():
            checkpoint = load_checkpoint(path)
            trained_as: dict[str, Any] = checkpoint.state.get("recipe", {}).get("model", {})
            return checkpoint.network, {key: trained_as[key] for key in TEMPORAL_SETTINGS if key in trained_as}
        saved = load_file(path) if path.suffix == ".safetensors" else _unpickled(init, path)
    except (CheckpointError, SafetensorError, OSError) as error:
        raise ConfigError(
            f"model.init={init} cannot be read: {error}. Fix: copy it again, or choose another"
        ) from error
    tensors = tensors_in(saved)
    return tensors, trained_with(tensors)


def _unpickled(init: str, path: Path) -> Mapping[str, Any]:
    """Load what torch.save wrote if it is only tensors and plain values."""
    try:
        with warnings.catch_warnings():
            # Of a file that was written with another protocol.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")
        named = next((line.strip() for line in reason if "GLOBAL" in line or "Unsupported" in line), reason[0])
        keep_tensors = (
            "import sys, torch; saved = torch.load(sys.argv[1], 'cpu', weights_only=False); "
            "torch.save(dict(saved.get('state_dict', saved)), sys.argv[2])"
        )
        raise ConfigError(
            f"model.init={init} holds more than tensors, or is damaged ({named}); nothing in it was executed. Fix, if you trust "
            f'where it is from: python -c "{keep_tensors}" {shlex.quote(str(path))} TENSORS.pth, and model.init=TENSORS.pth'
        ) from error
    # A damaged file can raise any of a dozen exceptions.
    except Exception as error:
        raise ConfigError(
            f"model.init={init} cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. "
            "Fix: copy it again, or choose another"
        ) from error
    if not isinstance(saved, Mapping):
        raise ConfigError(
            f"model.init={init} holds a {type(saved).__name__}, not tensors by name. Fix: save network.state_dict()"
        )
    return saved

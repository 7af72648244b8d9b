"""Evaluating weights as they are, a run's newest or those in a file: no training clips, no recipe, any number of processes."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from distributed.backends.base import Backend, broadcast_network
from distributed.checkpoint.store import BEST, Checkpoint, CheckpointError, load_checkpoint
from distributed.health.control_channel import ControlChannel
from pipelines.loading.clips import EvaluationClips
from pipelines.manifest import Manifest
from runtime import run_layout
from runtime.checkout import CHECKOUT
from runtime.exit_codes import EXIT_DATA, EXIT_DONE
from training.build.data import make_loader, open_manifest, protocol_of, source_of
from training.build.init_weights import RANDOM, find_initial_weights, load_initial_weights
from training.build.model import network_of
from training.build.normalise import Normaliser
from training.build.numerics import place_network
from training.config.schema import Config
from training.errors import ConfigError
from training.optim.ema import PREFIX
from training.recipe import fingerprint_of
from training.runs.resume import check_agreement, newest_checkpoint
from training.runs.run_folder import RunFolder
from tsm.networks import TemporalNetwork
from tsm.official import WeightsError, check_keys

from .evaluate import Evaluation, assess
from .saved_logits import Origin, save_logits

# What changes a network's function without changing its tensors, and so must be said as it was in training. The number of
# frames may differ: a TSN is often evaluated with more than it was trained with.
_SAME_AS_TRAINED = ("shift", "direction", "fold_div", "temporal_pool")


@dataclass(frozen=True)
class Weights:
    """Where the evaluated weights come from; `recipe`: the fingerprint of what trained them, or the hash of their file."""

    name: str
    step: int
    recipe: str


def evaluate_task(config: Config, backend: Backend, control: ControlChannel) -> int:
    """Evaluate a run's newest checkpoint, or the file that `model.init` names, and say what it scores; the exit code."""
    validation = open_manifest(config, "val")
    check_agreement(backend, config, [validation.digest])
    network = network_of(config)
    weights = backend.broadcast_object(_load(config, network) if backend.topology.rank == 0 else None)
    place_network(network, backend.device, config.numerics)
    broadcast_network(backend, network)

    clips = EvaluationClips(source_of(config, validation, backend.device), protocol_of(config))
    loader = make_loader(config, clips, backend)
    normalise = Normaliser(backend.device, config.numerics)
    evaluation = assess(
        network,
        normalise,
        clips,
        loader,
        backend,
        config.evaluation.batch,
        config.evaluation.amp,
        progress=lambda _: control.progress(weights.step, "evaluation"),
    )
    if backend.topology.rank == 0:
        _report(config, validation, weights, clips.protocol.name, evaluation)
    return EXIT_DATA if evaluation.scores.missing > config.data.max_bad_clips else EXIT_DONE


def _load(config: Config, network: TemporalNetwork) -> Weights:
    """On rank 0: put the weights that the configuration names into the network: their average, where the run kept one."""
    if config.run_id is not None:
        return _load_run(config, network)
    if config.model.init == RANDOM:
        raise ConfigError(
            "what is to be evaluated? Fix: run_id=NAME of a folder in outputs with the overrides that it was trained with, or "
            "model.init=FILE"
        )
    initial = find_initial_weights(config.model, CHECKOUT, None)
    untrained = network.classifier.weight.detach().clone()
    said = load_initial_weights(network, config.model, initial)
    if torch.equal(untrained, network.classifier.weight):
        raise ConfigError(
            f"these weights cannot be evaluated on {config.data.num_classes} classes: {said}. "
            "Fix: train with them, or choose the data set that they were trained on"
        )
    print(f"weights: {said}", flush=True)
    path = Path(config.model.init)
    name = path.resolve().parent.parent.name if path.name.startswith("step-") else path.name.split(".")[0]
    return Weights(name, 0, initial.identity)


def _load_run(config: Config, network: TemporalNetwork) -> Weights:
    assert config.run_id is not None
    folder = RunFolder(CHECKOUT / config.outputs / config.run_id)
    checkpoint = _best_checkpoint(folder) if config.evaluation.checkpoint == "best" else newest_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError(f"{folder.checkpoints} holds no whole checkpoint. Fix: run_id=NAME of a run that has one")
    recipe = checkpoint.state["recipe"]
    for key in _SAME_AS_TRAINED:
        then, now = recipe["model"][key], getattr(config.model, key)
        if then != now:
            raise ConfigError(
                f"{config.run_id} was trained with model.{key}={then}, not {now}. Fix: model.{key}={then}"
            )
    try:
        check_keys(checkpoint.network, network.state_dict())
    except WeightsError as error:
        raise ConfigError(
            f"the checkpoint of {config.run_id} is of another network: {error}. Fix: give the overrides that it was trained with"
        ) from error
    averaged = {
        name.removeprefix(PREFIX): tensor for name, tensor in checkpoint.optimizer.items() if name.startswith(PREFIX)
    }
    network.load_state_dict(checkpoint.network | averaged)
    return Weights(config.run_id, checkpoint.state["step"], fingerprint_of(recipe))


def _best_checkpoint(folder: RunFolder) -> Checkpoint:
    try:
        return load_checkpoint(folder.checkpoints / BEST)
    except CheckpointError as error:
        raise ConfigError(
            f"{error}: the run was not evaluated yet, or had checkpoint.keep_best=false. Fix: evaluation.checkpoint=newest"
        ) from error


def _report(config: Config, manifest: Manifest, weights: Weights, protocol: str, evaluation: Evaluation) -> None:
    print(evaluation.scores.describe(f"{weights.name} step {weights.step}  {protocol}"), flush=True)
    how = {"source": weights.name, "step": weights.step, "protocol": protocol, "amp": config.evaluation.amp}
    said = how | evaluation.scores.as_dict()
    print(json.dumps(said), flush=True)
    for record in evaluation.missing:
        print(f"missing: {record.reason}", flush=True)
    if config.evaluation.save_logits:
        origin = Origin(
            manifest_digest=manifest.digest,
            classes=manifest.classes,
            order_groups=manifest.order_groups,
            run_id=weights.name,
            step=weights.step,
            recipe=weights.recipe,
            protocol=protocol,
            amp=config.evaluation.amp,
        )
        folder = CHECKOUT / config.outputs / weights.name / run_layout.LOGITS
        print(f"saved: {save_logits(folder, evaluation.clip_logits, origin, evaluation.scores)}", flush=True)

"""The command of evaluate.py: evaluate a run's checkpoint or the weights in a file, with any number of processes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distributed.backends.base import Backend, broadcast_network
from distributed.health.control_channel import ControlChannel
from pipelines.clip_names import clip_names
from pipelines.loading.clips import EvaluationClips
from pipelines.manifest import Manifest
from runtime import run_layout
from runtime.checkout import CHECKOUT
from runtime.exit_codes import EXIT_DATA, EXIT_DONE
from training.build.class_names import REORDERED, UNNAMED, checkpoint_classes, digest_of, matched
from training.build.data import evaluation_clips_of, make_loader, open_manifest, protocol_of, source_of
from training.build.init_weights import RANDOM, find_initial_weights, load_initial_weights
from training.build.model import network_of
from training.build.normalise import Normaliser
from training.build.numerics import place_network
from training.config.load import read_config
from training.config.named_run import find_run
from training.config.schema import Config, EvaluationConfig
from training.errors import ConfigError
from training.recipe import fingerprint_of
from training.runs.resume import check_agreement
from training.runs.run_folder import RunFolder
from training.runs.trained_weights import load_into, read_trained_weights
from tsm.networks import TemporalNetwork

from .evaluate import Evaluation, describe_mirrored_views, evaluate
from .explain import explain_evaluation
from .run_config import Difference, by_key, differing_clips, differing_from_checkpoint, differing_views, settings_of
from .saved_logits import Origin, save_results
from .stream_command import STREAM, Subject, evaluate_on_stream, print_stream, save_stream, streamable


@dataclass(frozen=True)
class Weights:
    """Source of the evaluated weights."""

    name: str
    step: int
    recipe: str
    """Fingerprint of the recipe that trained them, or hash of their file."""
    differing: list[Difference]
    """Settings of this evaluation that are not those of the run."""
    notes: str = ""
    """What a reader of the scores must know of how classes were matched."""


def evaluate_task(config: Config, backend: Backend, control: ControlChannel) -> int:
    """Evaluate the run `run_id`, or else the weights that `model.init` names. Print the scores and return the exit code."""
    manifest = _open_clips(config)
    check_agreement(backend, asdict(config) | {"(manifest)": [manifest.digest]})
    network = network_of(config.model, config.data.num_classes)
    # Before loading, which would round float64 weights to float32.
    place_network(network, backend.device, config.numerics)
    on_stream = config.evaluation.clips == STREAM
    if on_stream:
        streamable(network)

    def load() -> Weights:
        if config.run_id is None:
            return _load_file(config, manifest, network)
        folder = RunFolder(CHECKOUT / config.outputs / config.run_id)
        weights = _load_run(folder, config, manifest, network)
        if config.evaluation.split == "val":
            weights.differing.extend(differing_clips(folder.metrics, manifest.digest))
        return weights

    fields = backend.broadcast_object(asdict(load()) if backend.topology.rank == 0 else None)
    weights = Weights(**fields | {"differing": [Difference(**each) for each in fields["differing"]]})
    broadcast_network(backend, network)
    if on_stream:
        return _stream_task(config, backend, control, manifest, network, weights)

    protocol = protocol_of(config.model, config.pipeline, config.evaluation)
    source = source_of(config.pipeline, manifest, backend.device, config.data.retry_s)
    clips = evaluation_clips_of(source, protocol, config.data)
    evaluation = evaluate(
        network,
        Normaliser(backend.device, config.numerics, config.model.modality),
        clips,
        make_loader(config.pipeline, clips, backend),
        backend,
        config.evaluation,
        progress=lambda _: control.progress(weights.step, "evaluation"),
    )
    if backend.topology.rank == 0:
        _print_scores(evaluation, weights, clips, config.evaluation)
        if config.evaluation.save_logits or config.evaluation.split == "test":
            folder = CHECKOUT / config.outputs / weights.name / run_layout.LOGITS
            _save(folder, evaluation, weights, manifest, protocol.name, config)
        if config.evaluation.explain:
            page = CHECKOUT / config.outputs / weights.name / run_layout.EXPLAIN
            title = evaluation.counts.describe(f"{weights.name} step {weights.step}  {protocol.name}")
            explain_evaluation(
                page,
                title,
                network,
                clips,
                evaluation.clip_logits,
                backend.device,
                config,
                progress=lambda: control.progress(weights.step, "evaluation"),
            )
            print(f"explained: {page}", flush=True)
    return EXIT_DATA if evaluation.counts.missing > config.data.max_bad_clips else EXIT_DONE


def _open_clips(config: Config) -> Manifest:
    """Open the manifest of evaluation.split. Raises ConfigError if its clips lack labels or names that the evaluation needs."""
    settings = config.evaluation
    manifest = open_manifest(config.data, settings.split)
    asked_for = [("evaluation=stream", settings.clips == STREAM), ("--explain", settings.explain > 0)]
    for what, is_asked_for in asked_for:
        if is_asked_for and not manifest.labelled:
            raise ConfigError(
                f"{what} compares answers with labels, and the clips of {manifest.path} have none. Fix: evaluation.split=val, or "
                f"leave {what} out"
            )
    if settings.split == "test" and clip_names(manifest) is None:
        raise ConfigError(
            f"{manifest.path} does not name its clips, so their predictions cannot be listed: they were put into shards, or "
            "transcoded, by an older version. Fix: run that prepare.py command again, which keeps the clips and adds the names"
        )
    return manifest


def _stream_task(
    config: Config,
    backend: Backend,
    control: ControlChannel,
    manifest: Manifest,
    network: TemporalNetwork,
    weights: Weights,
) -> int:
    """Evaluate the loaded network on a continuous stream. Print and save the record, and return the exit code."""
    beside = [_beside(named, config, manifest, backend) for named in config.evaluation.beside]
    own = Subject(weights.name, weights.step, config, network)
    results, answers = evaluate_on_stream(
        own, beside, manifest, backend, lambda _: control.progress(weights.step, "evaluation")
    )
    if backend.topology.rank == 0:
        protocol = protocol_of(config.model, config.pipeline, config.evaluation)
        fields, notes = _described(weights, protocol.name, config.evaluation, manifest.classes, [weights.notes])
        record = fields | results
        print_stream(record, notes, answers)
        save_stream(CHECKOUT / config.outputs / weights.name, record)
    return EXIT_DATA if len(answers.missing) > config.data.max_bad_clips else EXIT_DONE


def _beside(named: str, config: Config, manifest: Manifest, backend: Backend) -> Subject:
    """Load another run, as it was trained, to compare with; collective."""
    try:
        path, checkpoint = find_run(named)
    except ConfigError as error:
        raise ConfigError(f"evaluation.beside: {str(error).replace('--run ', '')}") from error
    theirs = read_config(path)
    if theirs.model.modality != config.model.modality:
        raise ConfigError(
            f"evaluation.beside: {named} is a network for model.modality={theirs.model.modality}, which sees no frames of these "
            "clips. Fix: leave it out"
        )
    theirs.evaluation.checkpoint = checkpoint or config.evaluation.checkpoint
    network = network_of(theirs.model, theirs.data.num_classes)
    place_network(network, backend.device, theirs.numerics)
    step = _load_run(RunFolder(path), theirs, manifest, network).step if backend.topology.rank == 0 else None
    step = backend.broadcast_object(step)
    broadcast_network(backend, network)
    return Subject(path.name, step, theirs, network)


def _load_file(config: Config, manifest: Manifest, network: TemporalNetwork) -> Weights:
    """Load the weights that `model.init` names into the network, its classifier in the class order of the data."""
    model = config.model
    if model.init == RANDOM:
        raise ConfigError("no weights to evaluate. Fix: --run outputs/NAME of a run, or model.init=FILE")
    initial = find_initial_weights(model, CHECKOUT, None)
    untrained = network.classifier.weight.detach().clone()
    summary = load_initial_weights(network, model, initial, manifest.classes)
    if torch.equal(untrained, network.classifier.weight):
        raise ConfigError(
            f"these weights cannot be evaluated on the {len(manifest.classes)} classes of {manifest.path}: {summary}. "
            "Fix: train with them, or choose the data set that they were trained on"
        )
    print(f"weights: {summary}", flush=True)
    path = Path(model.init)
    name = path.resolve().parent.parent.name if path.name.startswith("step-") else path.name.split(".")[0]
    differing = [] if initial.path is None else differing_from_checkpoint(initial.path, config)
    note = next((note for note in (UNNAMED, REORDERED) if note in summary), "")
    return Weights(name, 0, initial.identity, differing, note)


def _load_run(folder: RunFolder, config: Config, manifest: Manifest, network: TemporalNetwork) -> Weights:
    """Load a checkpoint of a run into the network: the EMA of the weights if the checkpoint has one."""
    run_id = folder.path.name
    found = read_trained_weights(folder, config.evaluation.checkpoint)
    recipe = found.state["recipe"]
    # A checkpoint that was copied without the run's configuration has at least its recipe.
    trained = settings_of(recipe, read_config(folder.path) if folder.config.exists() else None)
    differing = differing_views(run_id, trained, config)
    theirs = checkpoint_classes(found.state, folder.path, CHECKOUT / config.data.root / config.data.train)
    tensors, note = matched(found.tensors, theirs, f"the run {run_id}", manifest)
    load_into(network, tensors, run_id)
    return Weights(run_id, found.step, fingerprint_of(recipe), differing, note)


def _print_scores(evaluation: Evaluation, weights: Weights, clips: EvaluationClips, settings: EvaluationConfig) -> None:
    """Print the scores as a line to read and as a JSON line, then the missing clips."""
    protocol, classes = clips.protocol.name, clips.source.manifest.classes
    notes = [weights.notes, describe_mirrored_views(clips.mirror, classes)]
    fields, notes = _described(weights, protocol, settings, classes, notes)
    fields |= evaluation.counts.as_dict()
    split = "" if settings.split == "val" else f"  {settings.split} split"
    scores = evaluation.counts.describe(f"{weights.name} step {weights.step}  {protocol}{split}")
    print("  ".join([scores, *filter(None, notes)]), flush=True)
    print(json.dumps(fields), flush=True)
    for record in evaluation.missing:
        print(f"missing: {record.reason}", flush=True)


def _described(
    weights: Weights, protocol: str, settings: EvaluationConfig, classes: list[str], notes: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of any record that say what was evaluated and how, and the notes for the line to read."""
    fields = {
        "source": weights.name,
        "step": weights.step,
        "protocol": protocol,
        "split": settings.split,
        "amp": settings.amp,
        "notes": "; ".join(filter(None, notes)),
        "classes_sha256": digest_of(classes),
    }
    if weights.differing:
        notes = [*notes, f"differs from the run: {', '.join(map(str, weights.differing))}"]
        fields["differs_from_run"] = by_key(weights.differing)
    return fields, notes


def _save(
    folder: Path, evaluation: Evaluation, weights: Weights, manifest: Manifest, protocol: str, config: Config
) -> None:
    origin = Origin(
        manifest_digest=manifest.digest,
        classes=manifest.classes,
        order_groups=manifest.order_groups,
        run_id=weights.name,
        step=weights.step,
        recipe=weights.recipe,
        protocol=protocol,
        amp=config.evaluation.amp,
        differs_from_run=by_key(weights.differing),
        split=config.evaluation.split,
        clip_names=clip_names(manifest),
    )
    save_results(folder, evaluation.clip_logits, origin, evaluation.counts, config.data.max_bad_clips)

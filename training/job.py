"""From a configuration to a job that can take steps: every check that needs no step happens here."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed.backend import Backend, ReducerOptions, broadcast_network
from distributed.batch_norm import convert_batch_norm, set_running_statistics
from distributed.checkpoint import Checkpoint, load_newest
from distributed.control import ControlChannel
from distributed.optim.schedule import Schedule, scaled_rate
from pipelines.draw import Augmentation
from pipelines.loader import ClipSource, EvaluationClips, TrainingClips
from pipelines.manifest import Manifest, ManifestError
from pipelines.views import Protocol
from tsm.networks import TemporalNetwork, build_network

from .code_version import check_code, code_version
from .errors import ConfigError, DataError
from .initial import InitialWeights, find_initial_weights, load_initial_weights
from .input import Loader, make_loader, source_of
from .numerics import place_network
from .optimizers import make_optimizer, optimizer_tensors, set_step_counts
from .recipe import Execution, Recipe, plan_execution
from .run_folder import RunFolder, new_run_id
from .schema import Config
from .step import Normaliser, Trainer
from .weight_average import PREFIX, WeightAverage

CHECKOUT = Path(__file__).parent.parent

STATISTICS_BY_RANK = "batch_norm.statistics_by_rank"
"""Name of every rank's own running statistics in a checkpoint of the deterministic mode, shape (ranks, numbers)."""


@dataclass
class Job:
    """Everything that the loop works on, on one rank."""

    config: Config
    backend: Backend
    control: ControlChannel
    recipe: Recipe
    execution: Execution
    folder: RunFolder
    trainer: Trainer
    training_clips: TrainingClips
    validation_clips: EvaluationClips
    first_weights: str = ""
    """What the network started from, in words, on rank 0 of a new run."""
    code: dict[str, Any] = field(default_factory=dict)
    """Which code this is (training.code_version), on rank 0."""
    first_step: int = 0
    best_top1_percent: float = 0.0
    evaluation_owed: bool = False
    """The start before was stopped in front of the evaluation behind `first_step`, or within it."""

    def loader(self, dataset: TrainingClips | EvaluationClips) -> Loader:
        return make_loader(self.config, dataset, self.backend)


def open_manifest(config: Config, split: str) -> Manifest:
    """A split's manifest, checked against the configuration. Raises DataError that says how to mend it."""
    path = CHECKOUT / config.data.root / getattr(config.data, split)
    remedy = f" Fix: {config.data.prepare}" if config.data.prepare else ""
    try:
        manifest = Manifest.open(path)
    except ManifestError as error:
        raise DataError(f"{error}.{remedy}" if remedy else str(error)) from error
    if len(manifest.classes) != config.data.num_classes:
        raise DataError(f"{path} has {len(manifest.classes)} classes, but data.num_classes={config.data.num_classes}")
    return manifest


def augmentation_of(config: Config) -> Augmentation:
    """What training does to clips: a part of the recipe."""
    pipeline = config.pipeline
    pairs = config.data.mirrored_words if pipeline.flip == "relabel" else []
    return Augmentation(
        num_frames=config.model.num_frames,
        size=pipeline.size,
        sampling=pipeline.sampling,
        crop_scales=tuple(pipeline.crop_scales),
        flip=pipeline.flip,
        mirrored_words=tuple((one.lower(), other.lower()) for one, other in pairs),
    )


def protocol_of(config: Config) -> Protocol:
    """How clips are evaluated: no part of the recipe, so that a run can be evaluated in any way."""
    evaluation, clips = config.evaluation, config.evaluation.clips
    return Protocol(
        num_frames=config.model.num_frames,
        size=config.pipeline.size,
        clips=f"{config.pipeline.sampling}_validation" if clips == "validation" else clips,
        crops=evaluation.crops,
        full_resolution=evaluation.full_resolution,
        portrait_bug=evaluation.portrait_bug,
    )


def training_clips_of(config: Config, source: ClipSource) -> TrainingClips:
    try:
        return TrainingClips(source, augmentation_of(config), config.seed)
    except ValueError as error:
        raise ConfigError(f"pipeline.flip={config.pipeline.flip}: {error}") from error


def recipe_of(config: Config, num_rows: int, manifest_digest: str, first_weights: str | None = None) -> Recipe:
    """Derive the recipe: the peak rate from linear scaling, and everything that was said in epochs in steps.

    `first_weights` identifies what `model.init` names (training.initial): a file may move, its content decides the result.
    """
    batch, optimizer, schedule = config.batch, config.optimizer, config.schedule
    if num_rows < batch.global_batch:
        raise ConfigError(f"batch.global_batch={batch.global_batch} is more than the {num_rows} training clips")

    def steps(epochs: float) -> int:
        return round(epochs * num_rows / batch.global_batch)

    total_steps = steps(schedule.epochs)
    if total_steps < 1:
        raise ConfigError(
            f"schedule.epochs={schedule.epochs} of {num_rows} clips is less than a step of {batch.global_batch}"
        )
    return Recipe(
        seed=config.seed,
        global_batch=batch.global_batch,
        bn_group=batch.bn_clips,
        total_steps=total_steps,
        num_rows=num_rows,
        manifest_digest=manifest_digest,
        schedule=Schedule(
            decay=schedule.decay,  # type: ignore[arg-type]
            peak=scaled_rate(optimizer.lr, optimizer.base_batch, batch.global_batch, optimizer.scaling),  # type: ignore[arg-type]
            total_steps=total_steps,
            warmup_steps=steps(schedule.warmup_epochs),
            warmup_start=schedule.warmup_start,
            milestone_steps=tuple(steps(epoch) for epoch in schedule.milestones),
            factor=schedule.factor,
            end=schedule.end,
        ),
        model=_model_recipe(config, first_weights or config.model.init),
        optimizer=asdict(optimizer),
        augmentation=asdict(augmentation_of(config)),
        numerics={"dtype": config.numerics.dtype, "amp": config.numerics.amp},
    )


def _model_recipe(config: Config, first_weights: str) -> dict[str, Any]:
    model = asdict(config.model) | {"init": first_weights}
    del model["init_sha256"]
    return model


def check_agreement(backend: Backend, config: Config, manifest_digests: list[str]) -> None:
    """Refuse to train when ranks were started with different configurations or data; names them and the keys."""
    mine = _flat(asdict(config)) | {"(manifest)": manifest_digests}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    digests = backend.all_gather_objects(digest)
    if len(set(digests)) == 1:
        return
    usual = max(sorted(set(digests)), key=digests.count)
    odd = [rank for rank, digest in enumerate(digests) if digest != usual]
    others = backend.all_gather_objects(mine)
    reference = others[digests.index(usual)]
    differing = sorted({key for rank in odd for key in mine if others[rank][key] != reference[key]})
    shown = "; ".join(
        f"{key}: {reference[key]!r} but on rank {rank} {others[rank][key]!r}"
        for key in differing[:5]
        for rank in odd[:1]
        if others[rank][key] != reference[key]
    )
    raise ConfigError(
        f"ranks {odd} of {len(digests)} were started with another configuration or other data than the rest ({shown}). "
        "Fix: start all ranks with the same command, and give every node the same data"
    )


def _flat(nested: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def build_job(config: Config, backend: Backend, control: ControlChannel) -> Job:
    """Open the data, derive recipe and execution, make or resume the network; collective over all ranks.

    Raises ConfigError or DataError before any work is done when something cannot be.
    """
    topology = backend.topology
    if config.run_id is None:
        config.run_id = backend.broadcast_object(new_run_id(config, topology))
    folder = RunFolder(CHECKOUT / config.outputs / config.run_id)
    resumed, first = find_start(config, folder) if topology.rank == 0 else (None, None)
    code = code_version(CHECKOUT) if topology.rank == 0 else {}
    identity = backend.broadcast_object(first.identity if first else None)
    training, validation = open_manifest(config, "train"), open_manifest(config, "val")
    check_agreement(backend, config, [training.digest, validation.digest])
    recipe = recipe_of(config, len(training), training.digest, identity)
    execution = plan_execution(recipe.global_batch, recipe.bn_group, topology.size, config.batch.micro_batch)
    if resumed is not None:
        check_same(config, recipe, code, folder, resumed)
    state = backend.broadcast_object(resumed.state if resumed else None)

    network, first_weights = _build_network(config, backend, execution, None if resumed else first)
    optimizer = make_optimizer(network, config.optimizer)
    average = None if config.optimizer.ema_decay is None else WeightAverage(network, config.optimizer.ema_decay)
    if state is not None:
        _restore(backend, network, state_tensors(network, optimizer, average), resumed)
    options = ReducerOptions(
        execution.accumulation, config.distributed.wire == "float16", config.numerics.deterministic
    )
    trainer = Trainer(
        recipe=recipe,
        execution=execution,
        rank=topology.rank,
        network=network,
        optimizer=optimizer,
        reducer=backend.reducer(network, options),
        normalise=Normaliser(backend.device, config.numerics),
        scaler=torch.amp.GradScaler(backend.device.type, enabled=config.numerics.amp == "float16"),
        amp=config.numerics.amp,
        clip_norm=config.optimizer.clip_norm,
        label_smoothing=config.optimizer.label_smoothing,
        average=average,
    )
    job = Job(
        config=config,
        backend=backend,
        control=control,
        recipe=recipe,
        execution=execution,
        folder=folder,
        trainer=trainer,
        training_clips=training_clips_of(config, source_of(config, training, backend.device)),
        validation_clips=EvaluationClips(source_of(config, validation, backend.device), protocol_of(config)),
        first_weights=first_weights,
        code=code,
    )
    if state is not None:
        job.first_step, job.best_top1_percent = state["step"], state["best_top1_percent"]
        job.evaluation_owed = state.get("evaluation_owed", False)
        trainer.scaler.load_state_dict(state["scaler"])
        if config.numerics.deterministic:  # behind the making of the reducer: DDP's gives every rank rank 0's buffers
            _restore_own_statistics(backend, network, resumed)
        set_step_counts(optimizer, state["step_counts"])
    return job


def state_tensors(
    network: TemporalNetwork, optimizer: torch.optim.Optimizer, average: WeightAverage | None
) -> dict[str, Tensor]:
    """What a checkpoint holds by name beside the network; the tensors are the live ones."""
    return optimizer_tensors(network, optimizer) | (average.tensors() if average else {})


def network_of(config: Config) -> TemporalNetwork:
    """The network that the configuration describes, from random weights. Raises ConfigError for one that cannot be."""
    model = config.model
    try:
        return build_network(
            model.backbone,
            config.data.num_classes,
            model.num_frames,
            model.shift,  # type: ignore[arg-type]
            model.direction,  # type: ignore[arg-type]
            model.fold_div,
            model.temporal_pool,
            model.non_local,
            model.dropout,
            model.partial_bn,
            model.zero_init_gamma,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def _build_network(
    config: Config, backend: Backend, execution: Execution, first: InitialWeights | None
) -> tuple[TemporalNetwork, str]:
    """The network on its device, with batch norm over the recipe's groups, and rank 0's weights everywhere.

    `first`: the weights that rank 0 starts a new run from; the words say what was done with them.
    """
    network = network_of(config)
    convert_batch_norm(network, backend, execution.bn_ghosts, execution.bn_rank_groups(), execution.accumulation)
    place_network(network, backend.device, config.numerics)
    first_weights = "" if first is None else load_initial_weights(network, config.model, first)
    broadcast_network(backend, network)
    return network.train(), first_weights


def newest_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """A run's newest whole checkpoint; says which broken ones were passed over."""
    checkpoint, broken = load_newest(folder.checkpoints)
    for line in broken:
        print(f"passed over: {line}", flush=True)
    return checkpoint


def find_start(config: Config, folder: RunFolder) -> tuple[Checkpoint | None, InitialWeights]:
    """On rank 0: the checkpoint that this run goes on from, if any, and what its first weights are or were."""
    checkpoint = newest_checkpoint(folder)
    before = None if checkpoint is None else checkpoint.state["recipe"]["model"].get("init", "random")
    return checkpoint, find_initial_weights(config.model, CHECKOUT, before)


def check_same(config: Config, recipe: Recipe, code: dict[str, Any], folder: RunFolder, checkpoint: Checkpoint) -> None:
    """On rank 0: refuse to go on from a checkpoint of another recipe or other code, unless the configuration allows it."""
    before, now = checkpoint.state["recipe"], recipe.as_dict()
    before_flat, now_flat = _flat(before), _flat(now)
    differing = [key for key in now_flat if now_flat[key] != before_flat.get(key)]
    if differing and not config.checkpoint.allow_recipe_change:
        shown = "; ".join(f"{key}: {before_flat.get(key)!r} then, {now_flat[key]!r} now" for key in differing[:8])
        raise ConfigError(
            f"{folder.path} holds a run of another recipe ({shown}). "
            "Fix: choose another run_id, or go on with checkpoint.allow_recipe_change=true"
        )
    check_code(config, code, folder, checkpoint)
    print(f"resuming {folder.path.name} from step {checkpoint.state['step']}", flush=True)


def _restore(
    backend: Backend, network: TemporalNetwork, live: dict[str, Tensor], checkpoint: Checkpoint | None
) -> None:
    """Give every rank the checkpoint that rank 0 read; `live`: the tensors of `state_tensors`.

    What another recipe has no state of starts as in a new run: an average from the weights, an optimizer from rest.
    Raises ConfigError for the checkpoint of a network of other shapes.
    """
    if checkpoint is not None:
        try:
            network.load_state_dict(checkpoint.network)
        except RuntimeError as error:
            raise ConfigError(
                f"the checkpoint is of another network: {error}. "
                "Fix: choose another run_id, and start from these weights with model.init=FOLDER"
            ) from error
        first = {PREFIX + name: weight.detach() for name, weight in network.named_parameters()}
        absent = [name for name in live if name not in checkpoint.optimizer]
        for name, tensor in live.items():
            tensor.copy_(checkpoint.optimizer.get(name, first.get(name, tensor)))
        if absent:
            kinds = ", ".join(
                sorted({"the average of weights" if name in first else name.split(".")[-1] for name in absent})
            )
            print(f"the checkpoint has no state for {kinds}: it starts anew", flush=True)
    broadcast_network(backend, network)
    for name, tensor in live.items():
        dense = tensor.contiguous()
        backend.broadcast_(dense, f"optimizer.{name}")
        tensor.copy_(dense)


def _restore_own_statistics(backend: Backend, network: TemporalNetwork, checkpoint: Checkpoint | None) -> None:
    """Each rank's own running statistics, where the checkpoint has them of as many ranks; else they stay the mean."""
    rows_RS = None if checkpoint is None else checkpoint.optimizer.get(STATISTICS_BY_RANK)
    shape = backend.broadcast_object(None if rows_RS is None else list(rows_RS.shape))
    if shape is None or shape[0] != backend.topology.size:
        return
    parameter = next(network.parameters())
    shared_RS = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
    if rows_RS is not None:
        shared_RS.copy_(rows_RS)
    backend.broadcast_(shared_RS, "running_statistics_by_rank")
    set_running_statistics(network, shared_RS[backend.topology.rank])

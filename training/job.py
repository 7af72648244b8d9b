"""Assemble a job from its configuration. Every check that needs no training step happens here."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from distributed.backends.base import Backend, ReducerOptions
from distributed.checkpoint.store import Checkpoint
from distributed.health.control_channel import ControlChannel
from pipelines.loading.clips import EvaluationClips, TrainingClips
from runtime.checkout import CHECKOUT
from training.build.data import (
    Loader,
    augmentation_of,
    check_manifests,
    evaluation_clips_of,
    make_loader,
    open_manifest,
    protocol_of,
    source_of,
)
from training.build.init_weights import InitialWeights
from training.build.model import training_network_of
from training.build.normalise import Normaliser
from training.build.recipe import recipe_of
from training.build.stream import stream_sampling_of
from training.config.schema import Config
from training.optim.ema import EMA
from training.optim.optimizers import make_optimizer, set_step_counts
from training.runs.code_version import code_version
from training.runs.resume import (
    check_agreement,
    check_classes,
    check_same,
    find_start,
    restore,
    restore_own_statistics,
    state_tensors,
)
from training.runs.run_folder import RunFolder, new_run_id

from .micro_batch import find_micro_batch
from .recipe import Execution, Recipe, make_execution
from .step import Trainer


@dataclass
class Job:
    """Everything that the training loop works on, on one rank."""

    config: Config
    backend: Backend
    control: ControlChannel
    recipe: Recipe
    execution: Execution
    folder: RunFolder
    trainer: Trainer
    training_clips: TrainingClips
    validation_clips: EvaluationClips
    initial_weights: str = ""
    """Summary of the weights that the network started from, on rank 0 of a new run."""
    code: dict[str, Any] = field(default_factory=dict)
    """Version of the code (training.runs.code_version), on rank 0."""
    first_step: int = 0
    best_top1_percent: float = 0.0
    evaluation_owed: bool = False
    """The evaluation after `first_step` steps is due and has not been made: the previous start stopped before its end."""

    def loader(self, dataset: TrainingClips | EvaluationClips) -> Loader:
        log = self.control.log
        # One line on the terminal, not one per rank.
        warn = log.warning if self.backend.topology.rank == 0 else log.info
        return make_loader(self.config.pipeline, dataset, self.backend, warn)


def run_folder_of(config: Config, backend: Backend) -> RunFolder:
    """Return the run folder of a configuration, whose `run_id` is set if it is null. Collective."""
    if config.run_id is None:
        config.run_id = backend.broadcast_object(new_run_id(config.name, backend.topology))
    return RunFolder(CHECKOUT / config.outputs / config.run_id)


def build_job(config: Config, backend: Backend, control: ControlChannel) -> Job:
    """Open the data, derive recipe and execution, and make or resume the network. Collective.

    Raises ConfigError or DataError before any training if something does not fit.
    """
    topology = backend.topology
    folder = run_folder_of(config, backend)
    resumed, initial = find_start(config.model, config.checkpoint, folder) if topology.rank == 0 else (None, None)
    code = code_version(CHECKOUT) if topology.rank == 0 else {}
    identity = backend.broadcast_object(initial.identity if initial else None)
    training, validation = open_manifest(config.data, "train"), open_manifest(config.data, "val")
    check_agreement(backend, asdict(config) | {"(manifest)": [training.digest, validation.digest]})
    augmentation = augmentation_of(config.model, config.data, config.pipeline)
    check_manifests(training, validation, augmentation)
    recipe = recipe_of(config, len(training), training.digest, identity)
    limit = find_micro_batch(config, len(training.classes), backend)
    execution = make_execution(recipe.global_batch, recipe.bn_group, topology.size, limit)
    if resumed is not None:
        check_classes(folder, resumed, training)
        check_same(config.checkpoint, config.numerics.deterministic, recipe, code, folder, resumed)
    trainer, initial_weights, state = build_trainer(
        config, backend, recipe, execution, initial, resumed, training.classes
    )
    protocol = protocol_of(config.model, config.pipeline, config.evaluation)
    training_source, validation_source = (
        source_of(config.pipeline, manifest, backend.device, config.data.retry_s) for manifest in (training, validation)
    )
    return Job(
        config=config,
        backend=backend,
        control=control,
        recipe=recipe,
        execution=execution,
        folder=folder,
        trainer=trainer,
        training_clips=TrainingClips(training_source, augmentation, config.seed),
        validation_clips=evaluation_clips_of(validation_source, protocol, config.data),
        initial_weights=initial_weights,
        code=code,
        first_step=state.get("step", 0),
        best_top1_percent=state.get("best_top1_percent", 0.0),
        evaluation_owed=state.get("evaluation_owed", False),
    )


def build_trainer(
    config: Config,
    backend: Backend,
    recipe: Recipe,
    execution: Execution,
    initial: InitialWeights | None,
    resumed: Checkpoint | None,
    classes: list[str],
) -> tuple[Trainer, str, dict[str, Any]]:
    """Build the trainer, and restore it from the checkpoint that rank 0 read, if any. Collective.

    Returns also a summary of the initial weights, on rank 0 of a new run, and the checkpoint's state (empty for a new run).
    """
    state = backend.broadcast_object(resumed.state if resumed else None) or {}
    network, initial_weights = training_network_of(
        config.model, classes, config.numerics, backend, execution, None if resumed else initial
    )
    optimizer = make_optimizer(network, config.optimizer)
    ema = None if config.optimizer.ema_decay is None else EMA(network, config.optimizer.ema_decay)
    if state:
        restore(backend, network, state_tensors(network, optimizer, ema), resumed)
    compress = config.distributed.gradient_dtype == "float16"
    trainer = Trainer(
        recipe=recipe,
        execution=execution,
        rank=backend.topology.rank,
        network=network,
        optimizer=optimizer,
        reducer=backend.reducer(
            network, ReducerOptions(execution.accumulation, compress, config.numerics.deterministic)
        ),
        normalise=Normaliser(backend.device, config.numerics, config.model.modality),
        scaler=torch.amp.GradScaler(backend.device.type, enabled=config.numerics.amp == "float16"),
        amp=config.numerics.amp,
        clip_norm=config.optimizer.clip_norm,
        label_smoothing=config.optimizer.label_smoothing,
        ema=ema,
        stream=stream_sampling_of(config.pipeline),
    )
    if state:
        trainer.scaler.load_state_dict(state["scaler"])
        set_step_counts(optimizer, state["step_counts"])
        # After making the reducer, because DDP's gives every rank the buffers of rank 0.
        if config.numerics.deterministic:
            restore_own_statistics(backend, network, resumed)
    return trainer, initial_weights, state

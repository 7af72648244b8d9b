"""From a configuration to a job that can take steps: every check that needs no step happens here."""

from dataclasses import dataclass, field
from typing import Any

import torch

from distributed.backends.base import Backend, ReducerOptions
from distributed.health.control_channel import ControlChannel
from pipelines.loading.clips import EvaluationClips, TrainingClips
from runtime.checkout import CHECKOUT
from training.build.data import Loader, make_loader, open_manifest, protocol_of, source_of, training_clips_of
from training.build.model import _build_network
from training.build.normalise import Normaliser
from training.build.recipe import recipe_of
from training.config.schema import Config
from training.optim.ema import EMA
from training.optim.optimizers import make_optimizer, set_step_counts
from training.runs.code_version import code_version
from training.runs.resume import (
    _restore,
    _restore_own_statistics,
    check_agreement,
    check_same,
    find_start,
    state_tensors,
)
from training.runs.run_folder import RunFolder, new_run_id

from .recipe import Execution, Recipe, make_execution
from .step import Trainer


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
    initial_weights: str = ""
    """What the network started from, in words, on rank 0 of a new run."""
    code: dict[str, Any] = field(default_factory=dict)
    """Which code this is (training.runs.code_version), on rank 0."""
    first_step: int = 0
    best_top1_percent: float = 0.0
    evaluation_owed: bool = False
    """The start before was stopped in front of the evaluation behind `first_step`, or within it."""

    def loader(self, dataset: TrainingClips | EvaluationClips) -> Loader:
        return make_loader(self.config, dataset, self.backend)


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
    execution = make_execution(recipe.global_batch, recipe.bn_group, topology.size, config.batch.micro_batch)
    if resumed is not None:
        check_same(config, recipe, code, folder, resumed)
    state = backend.broadcast_object(resumed.state if resumed else None)

    network, initial_weights = _build_network(config, backend, execution, None if resumed else first)
    optimizer = make_optimizer(network, config.optimizer)
    average = None if config.optimizer.ema_decay is None else EMA(network, config.optimizer.ema_decay)
    if state is not None:
        _restore(backend, network, state_tensors(network, optimizer, average), resumed)
    options = ReducerOptions(
        execution.accumulation, config.distributed.gradient_dtype == "float16", config.numerics.deterministic
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
        ema=average,
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
        initial_weights=initial_weights,
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

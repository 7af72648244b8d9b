"""Plan a run: derive all numbers from its configuration, and collect all problems that would stop it.

One process, seconds. Needs no GPU, no process group and no data.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import TypeVar

from distributed.checkpoint.store import Checkpoint
from distributed.topology import TopologyError
from pipelines.manifest import Manifest
from runtime.checkout import CHECKOUT
from runtime.exit_codes import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, EXIT_REQUEUE
from training.build.data import augmentation_of, check_manifests, find_decoder, open_manifest
from training.build.init_weights import find_initial_weights
from training.build.recipe import recipe_of
from training.build.stream import stream_sampling_of
from training.config.checks import check_training
from training.config.schema import Config
from training.errors import ConfigError, DataError, StorageError
from training.recipe import Execution, Recipe, fitting_worlds, make_execution
from training.runs.code_version import code_version
from training.runs.resume import check_classes, check_same, find_start
from training.runs.run_folder import RunFolder
from training.runs.success import is_complete

from .checks import check_files, check_run_folder, check_single_process, sample_rows
from .estimates import NetworkEstimate, Rates, clip_bytes, estimate_network, estimate_rates, gradient_value_bytes
from .memory import StepCosts, step_costs
from .wandb_login import check_wandb_login

_Result = TypeVar("_Result")


@dataclass
class Plan:
    """The numbers of a run, as far as they can be derived. None: unknown, and `problems` say why."""

    config: Config
    world: int
    problems: list[Exception] = field(default_factory=list)
    """The errors that train.py would raise; it would stop at the first."""
    warnings: list[str] = field(default_factory=list)
    """What may go wrong, and would not stop the run."""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """By split, without missing ones."""
    stored_clip_bytes: float | None = None
    """Mean file size of some training clips."""
    weights: str | None = None
    """The identity of the initial weights (training.build.init_weights)."""
    recipe: Recipe | None = None
    execution: Execution | None = None
    worlds: list[int] = field(default_factory=list)
    """World sizes that fit the recipe."""
    network: NetworkEstimate | None = None
    costs: StepCosts | None = None
    rates: Rates | None = None
    complete: bool = False
    """The run is complete with this recipe: train.py would do nothing."""

    @property
    def clip_bytes(self) -> int:
        config = self.config
        frames = augmentation_of(config.model, config.data, config.pipeline).sample_frames
        return clip_bytes(frames, config.pipeline.size, config.model.modality)

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the recipe, as train.py computes it; None without the manifest or the initial weights."""
        known = self.recipe is not None and "train" in self.manifests and self.weights is not None
        return self.recipe.fingerprint if known and self.recipe is not None else None

    @property
    def exit_code(self) -> int:
        for kind, code in ((DataError, EXIT_DATA), (StorageError, EXIT_REQUEUE)):
            if self.problems and all(isinstance(problem, kind) for problem in self.problems):
                return code
        return EXIT_CONFIG if self.problems else EXIT_DONE

    def attempt(self, do: Callable[[], _Result]) -> _Result | None:
        """Return the result of `do`. If it fails in a way that the user can fix, add the problem and return None."""
        try:
            return do()
        except (ConfigError, DataError, StorageError, TopologyError) as error:
            if str(error) not in map(str, self.problems):
                self.problems.append(error)
            return None


def make_plan(config: Config) -> Plan:
    """Derive all numbers, and collect all problems, not only the first."""
    plan = Plan(config, world=config.distributed.world_size or config.plan.world_size or 1)
    plan.attempt(check_single_process)
    plan.attempt(lambda: check_training(config))
    for split in ("train", "val"):
        manifest = plan.attempt(lambda split=split: open_manifest(config.data, split))  # type: ignore[misc]
        if manifest is not None:
            plan.manifests[split] = manifest
            plan.attempt(lambda manifest=manifest: check_files(config.data, manifest))  # type: ignore[misc]
    _check_clips(plan)
    folder = RunFolder(CHECKOUT / config.outputs / (config.run_id or "new"))
    checkpoint = plan.attempt(lambda: _find_start(plan, folder))
    _derive(plan)
    if checkpoint is not None and plan.recipe is not None:
        recipe = plan.recipe
        code, deterministic = code_version(CHECKOUT), config.numerics.deterministic
        plan.attempt(lambda: check_classes(folder, checkpoint, plan.manifests.get("train")))
        plan.attempt(lambda: check_same(config.checkpoint, deterministic, recipe, code, folder, checkpoint))
    if plan.config.run_id is not None and plan.fingerprint is not None and plan.recipe is not None:
        step = None if checkpoint is None else checkpoint.state["step"]
        plan.complete = plan.attempt(lambda recipe=plan.recipe: is_complete(folder.success, recipe, step)) or False  # type: ignore[misc]
    plan.attempt(lambda: check_run_folder(folder))
    if (warning := plan.attempt(lambda: check_wandb_login(config.logger))) is not None:
        plan.warnings.append(warning)
    return plan


def _check_clips(plan: Plan) -> None:
    config, train = plan.config, plan.manifests.get("train")
    plan.attempt(lambda: find_decoder(config.pipeline))
    if train is None:
        return
    plan.stored_clip_bytes = fmean(row.length for row in sample_rows(train))
    augmentation = augmentation_of(config.model, config.data, config.pipeline)
    plan.attempt(lambda: check_manifests(train, plan.manifests.get("val", train), augmentation))


def _find_start(plan: Plan, folder: RunFolder) -> Checkpoint | None:
    """Return the checkpoint that the run would resume from, if any, and identify its initial weights."""
    if plan.config.run_id is None:
        checkpoint, initial = None, find_initial_weights(plan.config.model, CHECKOUT, None)
    else:
        checkpoint, initial = find_start(plan.config.model, plan.config.checkpoint, folder)
    plan.weights = initial.identity
    return checkpoint


def _derive(plan: Plan) -> None:
    config, batch = plan.config, plan.config.batch
    network = config.model, config.data.num_classes, config.pipeline.size
    value_bytes = gradient_value_bytes(config.numerics, config.distributed)
    plan.network = plan.attempt(lambda: estimate_network(*network, value_bytes))
    groups = batch.global_batch, batch.bn_clips
    plan.execution = plan.attempt(lambda: make_execution(*groups, plan.world, batch.micro_batch_limit))
    plan.worlds = fitting_worlds(*groups, batch.micro_batch_limit)
    if plan.network is not None and plan.execution is not None:
        execution, stream = plan.execution, stream_sampling_of(config.pipeline)
        plan.costs = plan.attempt(lambda: step_costs(*network, config.numerics, config.optimizer, execution, stream))
    train = plan.manifests.get("train")
    clips = len(train) if train is not None else config.data.train_clips
    if clips is not None:
        plan.recipe = plan.attempt(lambda: recipe_of(config, clips, train.digest if train else "", plan.weights))
    if plan.recipe is not None:
        plan.rates = estimate_rates(config.plan, plan.recipe, plan.clip_bytes, plan.world)

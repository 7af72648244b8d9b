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
from training.build.init_weights import WeightsMissing, find_initial_weights
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
from .on_cluster import MemoryRule, OnCluster, Point, check_memory, cluster_of, run_on, sweep
from .simulator.figures import Cluster
from .wandb_login import check_wandb_login
from .workload import on_device, workload_of

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
    """None: neither a cluster nor plan.step_s."""
    missing: list[str] = field(default_factory=list)
    """What a run needs and is not on this machine: manifests, downloaded weights."""
    cluster: Cluster | None = None
    on_cluster: OnCluster | None = None
    points: list[Point] = field(default_factory=list)
    """Of plan.sweep."""
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
            # A plan needs no weights, a run that is to start does.
            if isinstance(error, WeightsMissing) and not self.config.plan.write_config:
                self.missing.append(str(error).partition(";")[0])
            elif str(error) not in map(str, self.problems):
                self.problems.append(error)
            return None


def make_plan(config: Config) -> Plan:
    """Derive all numbers, and collect all problems, not only the first."""
    plan = Plan(config, world=config.distributed.world_size or config.plan.world_size or 1)
    plan.attempt(check_single_process)
    plan.attempt(lambda: check_training(config))
    _open_manifests(plan)
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


def _open_manifests(plan: Plan) -> None:
    """Open the manifests that are here. All are tried if a run is to start."""
    data = plan.config.data
    folder = CHECKOUT / data.root
    absent = [split for split in ("train", "val") if not (folder / getattr(data, split)).exists()]
    if plan.config.plan.write_config:
        absent = []
    for split in ("train", "val"):
        if split not in absent:
            manifest = plan.attempt(lambda split=split: open_manifest(data, split))  # type: ignore[misc]
            if manifest is not None:
                plan.manifests[split] = manifest
                plan.attempt(lambda manifest=manifest: check_files(data, manifest))  # type: ignore[misc]
    if absent:
        names = " and ".join(getattr(data, split) for split in absent)
        plan.missing.append(f"{names} in {folder} ({data.prepare or 'prepare.py, docs/data.md'})")


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
    plan.cluster = plan.attempt(lambda: cluster_of(config))
    if plan.cluster is not None:
        _simulate(plan, plan.cluster)
    elif config.plan.sweep:
        plan.problems.append(ConfigError("plan.sweep needs a cluster. Fix: cluster=summit, or another of conf/cluster"))
    _estimate_rates(plan)


def _simulate(plan: Plan, cluster: Cluster) -> None:
    """Compare the plan with the cluster's devices, and simulate the run if its recipe is known."""
    config, execution, costs, network = plan.config, plan.execution, plan.costs, plan.network
    rule = None
    if execution is not None and costs is not None:
        warning = plan.attempt(lambda: check_memory(config, cluster, costs, execution))
        plan.warnings += [warning] if warning else []
        rule = None if config.batch.is_auto else MemoryRule(costs, execution.micro_batch)
    if network is None or plan.recipe is None:
        return
    recipe, validation = plan.recipe, plan.manifests.get("val")
    checkpoint_bytes = 0 if costs is None else costs.checkpoint_bytes
    clips = None if validation is None else len(validation)
    stored_bytes, multiply_adds = plan.stored_clip_bytes, network.clip_multiply_adds
    workload = on_device(
        workload_of(config, recipe, multiply_adds, checkpoint_bytes, stored_bytes, clips), set(cluster.achieved_tflop_s)
    )
    if execution is not None:
        plan.on_cluster = plan.attempt(lambda: run_on(config, cluster, workload, execution, plan.worlds, rule))
    if config.plan.sweep:
        plan.points = plan.attempt(lambda: sweep(config, cluster, workload, rule)) or []


def _estimate_rates(plan: Plan) -> None:
    recipe, network, config = plan.recipe, plan.network, plan.config
    if recipe is None or network is None:
        return
    if config.plan.step_s is not None:
        step_s, source = config.plan.step_s, "plan.step_s"
    elif plan.on_cluster is not None:
        step_s, source = plan.on_cluster.simulation.step_s.centre, f"simulated on {plan.on_cluster.cluster.name}"
    else:
        return
    frames = augmentation_of(config.model, config.data, config.pipeline).sample_frames
    multiply_adds = network.clip_multiply_adds * frames // config.model.num_frames
    plan.rates = estimate_rates(step_s, source, recipe, plan.clip_bytes, multiply_adds, plan.world)

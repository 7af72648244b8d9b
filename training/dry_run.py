"""The plan of a run before there is one: everything derived from its configuration, and all that would keep it from starting.

One process, seconds; no GPU, no process group, and no data are needed.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from distributed.checkpoint import Checkpoint
from distributed.topology import TopologyError, find_topology
from pipelines.decode import choose_decoder
from pipelines.loader import ClipSource
from pipelines.manifest import JPEG_FRAMES, Manifest

from .charts import schedule_figure
from .errors import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, ConfigError, DataError
from .figures import NetworkFigures, Rates, clip_bytes, network_figures, rates_of, ring_bytes
from .initial import find_initial_weights
from .job import CHECKOUT, check_recipe, find_start, open_manifest, recipe_of, training_clips_of
from .memory import LEFT_OUT, StepCosts, step_costs
from .plan import describe_execution, describe_gradients, describe_network, describe_recipe
from .recipe import Execution, Recipe, fitting_worlds, plan_execution
from .run_folder import RunFolder
from .schema import Config, from_composed

FILES_LOOKED_AT = 500  # of each split: enough to see that a disk is not mounted, few enough for a slow file system

_Found = TypeVar("_Found")


@dataclass
class Plan:
    """What is known of a run. None: not known, and `problems` say why."""

    config: Config
    world: int
    problems: list[Exception] = field(default_factory=list)
    """In the words of train.py, which would stop at the first."""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """By split; one that is missing is a problem."""
    weights: str | None = None
    """The identity of the first weights (training.initial)."""
    recipe: Recipe | None = None
    execution: Execution | None = None
    worlds: list[int] = field(default_factory=list)
    """Those that fit the recipe."""
    network: NetworkFigures | None = None
    costs: StepCosts | None = None
    rates: Rates | None = None

    @property
    def fingerprint(self) -> str | None:
        """train.py's, which needs the manifest and the first weights."""
        known = self.recipe is not None and "train" in self.manifests and self.weights is not None
        return self.recipe.fingerprint if known and self.recipe is not None else None

    @property
    def exit_code(self) -> int:
        if all(isinstance(problem, DataError) for problem in self.problems):
            return EXIT_DATA if self.problems else EXIT_DONE
        return EXIT_CONFIG

    def noting(self, do: Callable[[], _Found]) -> _Found | None:
        """What `do` returns, or None when it fails in a way that a user can mend."""
        try:
            return do()
        except (ConfigError, DataError, TopologyError) as error:
            if str(error) not in map(str, self.problems):
                self.problems.append(error)
            return None


def run_plan(composed: Any) -> int:
    """Print the plan of a composed configuration, and write what `plan.json` and `plan.plot` name; returns the exit code.

    0, or that of train.py: 2 for the configuration (whatever else is wrong), 3 for the data.
    """
    try:
        plan = make_plan(from_composed(composed))
        print(describe(plan), flush=True)
        _write(plan)
    except ConfigError as error:
        print(f"error (plan): {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    for problem in plan.problems:
        print(f"error (plan): {problem}", file=sys.stderr, flush=True)
    return plan.exit_code


def make_plan(config: Config) -> Plan:
    """Derive all numbers, and collect every problem rather than the first."""
    plan = Plan(config, world=config.distributed.world_size or config.plan.world_size or 1)
    plan.noting(_check_alone)
    for split in ("train", "val"):
        manifest = plan.noting(lambda split=split: open_manifest(config, split))  # type: ignore[misc]
        if manifest is not None:
            plan.manifests[split] = manifest
            plan.noting(lambda manifest=manifest: _check_files(config, manifest))  # type: ignore[misc]
    decoder = plan.noting(lambda: _find_decoder(config))
    if "train" in plan.manifests and decoder is not None:
        source = ClipSource(plan.manifests["train"].path, decoder)
        plan.noting(lambda: training_clips_of(config, source))
    folder = RunFolder(CHECKOUT / config.outputs / (config.run_id or "new"))
    checkpoint = plan.noting(lambda: _find_start(plan, folder))
    _derive(plan)
    if checkpoint is not None and plan.recipe is not None:
        recipe = plan.recipe
        plan.noting(lambda: check_recipe(config, recipe, folder, checkpoint))
    plan.noting(lambda: _check_folder(folder))
    return plan


def _derive(plan: Plan) -> None:
    config, batch = plan.config, plan.config.batch
    plan.network = plan.noting(lambda: network_figures(config))
    train = plan.manifests.get("train")
    clips = len(train) if train is not None else config.data.train_clips
    if clips is None:
        return
    bn_group = batch.bn_group or batch.global_batch
    plan.execution = plan.noting(lambda: plan_execution(batch.global_batch, bn_group, plan.world, batch.micro_batch))
    plan.worlds = fitting_worlds(batch.global_batch, bn_group, batch.micro_batch)
    plan.recipe = plan.noting(lambda: recipe_of(config, clips, train.digest if train else "", plan.weights))
    if plan.network is not None and plan.execution is not None:
        execution = plan.execution
        plan.costs = plan.noting(lambda: step_costs(config, execution))
    if plan.recipe is not None:
        plan.rates = rates_of(config, plan.recipe, plan.world)


# ------------------------------------------------------------------------------------------------------------------- checks


def _check_alone() -> None:
    topology = find_topology()
    if topology.size > 1:
        raise ConfigError(
            f"plan.py is the work of one process, and {topology.launcher} started {topology.size}. Fix: python plan.py, "
            f"without a launcher, with distributed.world_size={topology.size}"
        )


def _find_decoder(config: Config) -> str:
    try:
        return choose_decoder(config.pipeline.decoder)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_files(config: Config, manifest: Manifest) -> None:
    """Look for some files of a split, evenly spread over it. Raises DataError for more missing ones than a run tolerates."""
    looked_at = min(FILES_LOOKED_AT, len(manifest))
    missing = []
    for number in range(looked_at):
        row = manifest.row(number * len(manifest) // looked_at)
        path = manifest.root / (row.path.rsplit("/", 1)[0] if row.codec == JPEG_FRAMES else row.path)
        try:
            cut_short = row.codec != JPEG_FRAMES and path.stat().st_size < row.offset + row.length
            if cut_short or not path.exists():
                missing.append(f"{path} is shorter than its manifest says" if cut_short else f"{path}: no such folder")
        except OSError as error:
            missing.append(f"{path}: {error.strerror}")
    if len(missing) > config.data.max_bad_clips:
        raise DataError(
            f"{manifest.path}: of {looked_at} clips looked at, {len(missing)} are not there ({missing[0]}). "
            f"Fix: restore the files, or make the manifest anew ({config.data.prepare or 'prepare.py'})"
        )


def _find_start(plan: Plan, folder: RunFolder) -> Checkpoint | None:
    """The checkpoint that a run of this name goes on from, if any; and what the first weights are, or were."""
    if plan.config.run_id is None:
        checkpoint, first = None, find_initial_weights(plan.config.model, CHECKOUT, None)
    else:
        checkpoint, first = find_start(plan.config, folder)
    plan.weights = first.identity
    return checkpoint


def _check_folder(folder: RunFolder) -> None:
    existing = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        reason = "is not writable" if existing.is_dir() else "is a file"
        raise ConfigError(f"cannot make the run folder {folder.path}: {existing} {reason}. Fix: outputs=FOLDER")


# ------------------------------------------------------------------------------------------------------------------- output


def describe(plan: Plan) -> str:
    """The plan in words; the lines of train.py are train.py's."""
    config = plan.config
    identity = plan.fingerprint or "not known before manifests and first weights are there"
    lines = [f"plan       {config.name}  recipe {identity}  seed {config.seed}"]
    if "train" not in plan.manifests and config.data.train_clips is not None:
        lines += [f"clips      {config.data.train_clips}: as published (data.train_clips), there is no manifest here"]
    if plan.recipe is not None:
        lines += describe_recipe(plan.recipe)
    if plan.network is not None:
        lines += [describe_network(config, plan.network)]
    if plan.execution is not None:
        lines += describe_execution(plan.execution)
    if plan.worlds:
        lines += [f"worlds     of {', '.join(map(str, plan.worlds))} processes fit this batch"]
    if plan.network is not None:
        sent_bytes = ring_bytes(plan.network.gradient_bytes, plan.world)
        lines += [
            f"{describe_gradients(config, plan.network)}; over a ring of {plan.world} each sends {sent_bytes / 1e6:.1f} MB"
        ]
    if plan.costs is not None:
        lines += _describe_costs(config, plan.costs)
    lines += _describe_input(plan)
    count = len(plan.problems)
    lines += [f"problems   {count}, below" if count else "problems   none: train.py would start"]
    return "\n".join(lines)


def _describe_costs(config: Config, costs: StepCosts) -> list[str]:
    rest_bytes = costs.peak_bytes - costs.weights_bytes - costs.optimizer_bytes
    weights, optimizer, rest, peak = (
        f"{size_bytes / 2**30:.2f}"
        for size_bytes in (costs.weights_bytes, costs.optimizer_bytes, rest_bytes, costs.peak_bytes)
    )
    return [
        f"bn sums    {costs.bn_messages} messages a step, {costs.bn_message_bytes / 1e6:.2f} MB a process",
        f"memory     {peak} GiB a process at a step's peak: weights {weights}, optimizer {optimizer}, activations, gradients and "
        f"input {rest}",
        f"           not in it: {LEFT_OUT}",
        f"checkpoint {costs.checkpoint_bytes / 1e6:.1f} MB, {config.checkpoint.keep} are kept",
    ]


def _describe_input(plan: Plan) -> list[str]:
    lines = [f"input      {clip_bytes(plan.config) / 1e6:.2f} MB a clip as decoded (uint8)"]
    if plan.rates is not None:
        rates = plan.rates
        lines += [
            f"at         {rates.step_s:g} s a step ({rates.step_s_from}): {rates.clips_per_s:,.0f} clips/s, "
            f"{rates.clips_per_s_per_process:.1f} a process, {rates.decoded_bytes_per_s / 1e9:.1f} GB/s decoded, "
            f"all steps in {rates.duration_s / 60:.1f} min",
        ]
    return lines


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values: units are in the names, what is not known is null."""
    config, recipe, network = plan.config, plan.recipe, plan.network
    manifest = plan.manifests.get("train")
    said_of_recipe = recipe and recipe.as_dict() | {
        "steps_per_epoch": recipe.steps_per_epoch, "epochs": recipe.epochs, "fingerprint": plan.fingerprint,
    }  # fmt: skip
    return {
        "name": config.name,
        "world_size": plan.world,
        "fitting_worlds": plan.worlds,
        "train_clips_from": str(manifest.path) if manifest is not None else "data.train_clips",
        "recipe": said_of_recipe,
        "execution": plan.execution and asdict(plan.execution),
        "network": network
        and asdict(network) | {"ring_bytes_per_process": ring_bytes(network.gradient_bytes, plan.world)},
        "costs_per_process": plan.costs and asdict(plan.costs) | {"memory_left_out": LEFT_OUT},
        "clip_bytes": clip_bytes(config),
        "rates": plan.rates and asdict(plan.rates),
        "problems": [{"kind": type(problem).__name__, "message": str(problem)} for problem in plan.problems],
        "exit_code": plan.exit_code,
    }


def _write(plan: Plan) -> None:
    config, recipe = plan.config, plan.recipe
    try:
        if config.plan.json is not None:
            Path(config.plan.json).write_text(json.dumps(as_dict(plan), indent=1) + "\n")
        if config.plan.plot is not None and recipe is not None:
            schedule_figure(recipe.schedule, recipe.steps_per_epoch).savefig(config.plan.plot)
    except (OSError, ValueError) as error:  # a ValueError: matplotlib does not know the ending
        raise ConfigError(f"cannot write what plan.json or plan.plot names: {error}. Fix: another path") from error

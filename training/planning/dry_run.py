"""The plan of a run before there is one: everything derived from its configuration, and all that would keep it from starting.

One process, seconds; no GPU, no process group, and no data are needed.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from distributed.checkpoint.store import Checkpoint
from distributed.topology import TopologyError
from pipelines.loading.clips import ClipSource
from pipelines.manifest import Manifest
from runtime.checkout import CHECKOUT
from runtime.exit_codes import EXIT_CONFIG, EXIT_DATA, EXIT_DONE
from training.build.data import augmentation_of, find_decoder, open_manifest, training_clips_of
from training.build.init_weights import find_initial_weights
from training.build.recipe import recipe_of
from training.config.load import from_composed
from training.config.schema import Config
from training.errors import ConfigError, DataError
from training.recipe import Execution, Recipe, fitting_worlds, make_execution
from training.report.charts import schedule_figure
from training.runs.code_version import code_version
from training.runs.resume import check_same, find_start
from training.runs.run_folder import RunFolder

from .checks import check_alone, check_files, check_folder, looked_at
from .estimates import NetworkFigures, Rates, clip_bytes, network_figures, rates_of, ring_bytes
from .memory import LEFT_OUT, StepCosts, step_costs
from .summary import describe_execution, describe_gradients, describe_network, describe_numerics, describe_recipe

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
    stored_clip_bytes: float | None = None
    """Mean size of a training clip on its disk, of the clips looked at."""
    weights: str | None = None
    """The identity of the first weights (training.build.init_weights)."""
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
    """Print the plan of a composed configuration, and write what `plan.*` asks for; returns the exit code.

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
    plan.noting(check_alone)
    for split in ("train", "val"):
        manifest = plan.noting(lambda split=split: open_manifest(config.data, split))  # type: ignore[misc]
        if manifest is not None:
            plan.manifests[split] = manifest
            plan.noting(lambda manifest=manifest: check_files(config, manifest))  # type: ignore[misc]
    if "train" in plan.manifests:
        plan.stored_clip_bytes = fmean(row.length for row in looked_at(plan.manifests["train"]))
    decoder = plan.noting(lambda: find_decoder(config.pipeline))
    if "train" in plan.manifests and decoder is not None:
        source = ClipSource(plan.manifests["train"].path, decoder)
        augmentation = augmentation_of(config.model, config.data, config.pipeline)
        plan.noting(lambda: training_clips_of(source, augmentation, config.seed))
    folder = RunFolder(CHECKOUT / config.outputs / (config.run_id or "new"))
    checkpoint = plan.noting(lambda: _find_start(plan, folder))
    _derive(plan)
    if checkpoint is not None and plan.recipe is not None:
        recipe, deterministic = plan.recipe, config.numerics.deterministic
        code = code_version(CHECKOUT)
        plan.noting(lambda: check_same(config.checkpoint, deterministic, recipe, code, folder, checkpoint))
    plan.noting(lambda: check_folder(folder))
    return plan


def _derive(plan: Plan) -> None:
    config, batch = plan.config, plan.config.batch
    plan.network = plan.noting(lambda: network_figures(config))
    wanted = batch.global_batch, batch.bn_clips
    plan.execution = plan.noting(lambda: make_execution(*wanted, plan.world, batch.micro_batch))
    plan.worlds = fitting_worlds(*wanted, batch.micro_batch)
    if plan.network is not None and plan.execution is not None:
        execution = plan.execution
        plan.costs = plan.noting(lambda: step_costs(config, execution))
    train = plan.manifests.get("train")
    clips = len(train) if train is not None else config.data.train_clips
    if clips is not None:
        plan.recipe = plan.noting(lambda: recipe_of(config, clips, train.digest if train else "", plan.weights))
    if plan.recipe is not None:
        plan.rates = rates_of(config, plan.recipe, plan.world)


def _find_start(plan: Plan, folder: RunFolder) -> Checkpoint | None:
    """The checkpoint that a run of this name goes on from, if any; and what the first weights are, or were."""
    if plan.config.run_id is None:
        checkpoint, first = None, find_initial_weights(plan.config.model, CHECKOUT, None)
    else:
        checkpoint, first = find_start(plan.config.model, folder)
    plan.weights = first.identity
    return checkpoint


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
    lines += [describe_numerics(config)]
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
        f"checkpoint {costs.checkpoint_bytes / 1e6:.1f} MB, {config.checkpoint.keep} are kept"
        f"{', and the best' if config.checkpoint.keep_best else ''}",
    ]


def _describe_input(plan: Plan) -> list[str]:
    stored_bytes = plan.stored_clip_bytes
    stored = f", {stored_bytes / 1e6:.3g} MB as stored" if stored_bytes is not None else ""
    lines = [f"input      {clip_bytes(plan.config) / 1e6:.2f} MB a clip as decoded (uint8){stored}"]
    if plan.rates is not None:
        rates = plan.rates
        lines += [
            f"at         {rates.step_s:g} s a step ({rates.step_s_from}): {rates.clips_per_s:,.0f} clips/s, "
            f"{rates.clips_per_s_per_process:.1f} a process, {rates.decoded_bytes_per_s / 1e9:.1f} GB/s decoded, "
            f"all steps in {rates.duration_s / 60:.1f} min",
        ]
        if stored_bytes is not None:
            lines += [f"           {rates.clips_per_s * stored_bytes / 1e9:.3g} GB/s read from storage"]
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
        "numerics": asdict(config.numerics) | {"evaluation_amp": config.evaluation.amp},
        "network": network
        and asdict(network) | {"ring_bytes_per_process": ring_bytes(network.gradient_bytes, plan.world)},
        "costs_per_process": plan.costs and asdict(plan.costs) | {"memory_left_out": LEFT_OUT},
        "clip_bytes": clip_bytes(config),
        "stored_clip_bytes": plan.stored_clip_bytes,
        "rates": plan.rates and asdict(plan.rates),
        "problems": [{"kind": type(problem).__name__, "message": str(problem)} for problem in plan.problems],
        "exit_code": plan.exit_code,
    }


def _write(plan: Plan) -> None:
    config, recipe = plan.config, plan.recipe
    if config.plan.write_config:
        if config.run_id is None:
            raise ConfigError("plan.write_config=true needs the name of the run. Fix: run_id=NAME")
        if not plan.problems:
            RunFolder(CHECKOUT / config.outputs / config.run_id).write_config(config)
    try:
        if config.plan.json is not None:
            Path(config.plan.json).write_text(json.dumps(as_dict(plan), indent=1) + "\n")
        if config.plan.plot is not None and recipe is not None:
            schedule_figure(recipe.schedule, recipe.steps_per_epoch).savefig(config.plan.plot)
    except (OSError, ValueError) as error:  # a ValueError: matplotlib does not know the ending
        raise ConfigError(f"cannot write what plan.json or plan.plot names: {error}. Fix: another path") from error

"""Write a plan as text and as JSON."""

from dataclasses import asdict
from typing import Any

from training.build.data import augmentation_of, describe_mirror
from training.config.schema import CheckpointConfig

from .estimates import ring_bytes
from .memory import LEFT_OUT, StepCosts
from .on_cluster import whole_worlds
from .plan import Plan
from .run_text import describe_points, describe_run, run_fields
from .summary import describe_execution, describe_gradients, describe_network, describe_numerics, describe_recipe


def as_text(plan: Plan) -> str:
    """Return the plan as lines to read. Lines that train.py prints too are the same."""
    config = plan.config
    identity = plan.fingerprint or "unknown without manifests and initial weights"
    lines = [f"plan       {config.name}  recipe {identity}  seed {config.seed}"]
    if "train" not in plan.manifests and config.data.train_clips is not None:
        lines += [f"clips      {config.data.train_clips}: as published (data.train_clips), there is no manifest here"]
    if plan.recipe is not None:
        lines += describe_recipe(plan.recipe)
    if plan.network is not None:
        lines += [describe_network(config.model, config.pipeline.size, plan.network)]
    lines += [describe_numerics(config.numerics, config.evaluation.amp)]
    if plan.execution is not None:
        lines += describe_execution(plan.execution)
        if config.batch.is_auto:
            lines += ["           batch.micro_batch=auto: on GPUs, fewer clips if that does not fit into the memory"]
    if plan.worlds:
        lines += [_describe_worlds(plan)]
    if plan.network is not None:
        gradients = describe_gradients(config.distributed.gradient_dtype, plan.network)
        sent_bytes = ring_bytes(plan.network.gradient_bytes, plan.world)
        lines += [f"{gradients}; in a ring of {plan.world} each sends {sent_bytes / 1e6:.1f} MB"]
    if plan.costs is not None:
        lines += _describe_costs(plan.costs, config.checkpoint)
    lines += _describe_input(plan)
    if plan.on_cluster is not None:
        lines += describe_run(plan.on_cluster)
    if plan.points and plan.cluster is not None:
        lines += describe_points(plan.points, plan.cluster["gpus_per_node"])
    if "train" in plan.manifests:
        lines += describe_mirror(plan.manifests["train"], augmentation_of(config.model, config.data, config.pipeline))
    if plan.missing:
        lines += [f"missing    {', '.join(plan.missing)}"]
    count = len(plan.problems)
    start = "do nothing, because the run is finished (SUCCESS is there)" if plan.complete else "start"
    if plan.missing:
        start = "start once nothing is missing"
    lines += [f"problems   {count}, below" if count else f"problems   none: train.py would {start}"]
    return "\n".join(lines)


def _describe_worlds(plan: Plan) -> str:
    if plan.cluster is None:
        return f"worlds     of {', '.join(map(str, plan.worlds))} processes fit this batch"
    worlds = whole_worlds(plan.worlds, plan.cluster)
    return f"worlds     nodes x GPUs of {plan.cluster.name} that fit this batch: {', '.join(worlds)}"


def _describe_costs(costs: StepCosts, checkpoint: CheckpointConfig) -> list[str]:
    rest_bytes = costs.peak_bytes - costs.weights_bytes - costs.optimizer_bytes
    weights, optimizer, rest, peak = (
        f"{size_bytes / 2**30:.2f}"
        for size_bytes in (costs.weights_bytes, costs.optimizer_bytes, rest_bytes, costs.peak_bytes)
    )
    return [
        f"bn sums    {costs.bn_messages} messages per step, {costs.bn_message_bytes / 1e6:.2f} MB per process",
        f"memory     {peak} GiB per process at a step's peak: weights {weights}, optimizer {optimizer}, activations, gradients "
        f"and input {rest}",
        f"           without {LEFT_OUT}",
        f"checkpoint {costs.checkpoint_bytes / 1e6:.1f} MB, the newest {checkpoint.keep} are kept"
        f"{', and the best' if checkpoint.keep_best else ''}",
    ]


def _describe_input(plan: Plan) -> list[str]:
    stored_bytes = plan.stored_clip_bytes
    stored = f", {stored_bytes / 1e6:.3g} MB stored" if stored_bytes is not None else ""
    lines = [f"input      {plan.clip_bytes / 1e6:.2f} MB per clip decoded (uint8){stored}"]
    if plan.rates is not None:
        rates = plan.rates
        lines += [
            f"at         {rates.step_s:g} s per step ({rates.step_s_from}): {rates.clips_per_s:,.0f} clips/s, "
            f"{rates.clips_per_s_per_process:.1f} ({rates.tflop_s_per_process:.3g} TFLOP/s) per process, "
            f"{rates.decoded_bytes_per_s / 1e9:.1f} GB/s decoded, all steps in {rates.duration_s / 60:.1f} min",
        ]
        if stored_bytes is not None:
            lines += [f"           {rates.clips_per_s * stored_bytes / 1e9:.3g} GB/s read from storage"]
    return lines


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values. Units are in the names; unknown values are null."""
    config, recipe, network = plan.config, plan.recipe, plan.network
    manifest = plan.manifests.get("train")
    recipe_fields = recipe and recipe.as_dict() | {
        "steps_per_epoch": recipe.steps_per_epoch,
        "epochs": recipe.epochs,
        "fingerprint": plan.fingerprint,
    }
    network_fields = network and asdict(network) | {
        "ring_bytes_per_process": ring_bytes(network.gradient_bytes, plan.world)
    }
    return {
        "name": config.name,
        "world_size": plan.world,
        "fitting_worlds": plan.worlds,
        "train_clips_from": str(manifest.path) if manifest is not None else "data.train_clips",
        "recipe": recipe_fields,
        "execution": plan.execution and asdict(plan.execution),
        "numerics": asdict(config.numerics) | {"evaluation_amp": config.evaluation.amp},
        "network": network_fields,
        "costs_per_process": plan.costs and asdict(plan.costs) | {"memory_left_out": LEFT_OUT},
        "clip_bytes": plan.clip_bytes,
        "stored_clip_bytes": plan.stored_clip_bytes,
        "rates": plan.rates and asdict(plan.rates),
        "missing": plan.missing,
        **run_fields(plan.on_cluster, plan.points, plan.cluster),
        "problems": [{"kind": type(problem).__name__, "message": str(problem)} for problem in plan.problems],
        "warnings": plan.warnings,
        "exit_code": plan.exit_code,
    }

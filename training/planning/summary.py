"""Describe the derived numbers of a run as lines to read, for train.py at start-up and for plan.py."""

from torch import nn

from distributed.batch_norm.synchronized import message_bytes
from training.build.data import describe_input, describe_mirror
from training.config.schema import ModelConfig, NumericsConfig
from training.job import Job
from training.optim.optimizers import describe_optimizer
from training.recipe import Execution, Recipe
from training.schedule import Schedule
from tsm.modality import INPUT_CHANNELS

from .estimates import NetworkEstimate, estimate_network, gradient_value_bytes


def describe_job(job: Job) -> str:
    """Describe what is trained, where it runs, and how each number was derived."""
    config, topology = job.config, job.backend.topology
    source = job.training_clips.source
    value_bytes = gradient_value_bytes(config.numerics, config.distributed)
    network = estimate_network(config.model, config.data.num_classes, config.pipeline.size, value_bytes)
    lines = [
        f"run        {job.folder.path.name}  recipe {job.recipe.fingerprint}  seed {job.recipe.seed}",
        *describe_recipe(job.recipe),
        describe_network(config.model, config.pipeline.size, network),
        describe_numerics(config.numerics, config.evaluation.amp),
        f"optimizer  {describe_optimizer(job.trainer.optimizer)}",
        *([f"weights    {job.initial_weights}"] if job.initial_weights else []),
        f"world      {topology.size} x {job.backend.device.type}, backend {job.backend.name}, launcher {topology.launcher}",
        f"input      {describe_input(config.pipeline, source, job.backend)}",
        *describe_mirror(source.manifest, job.training_clips.augmentation),
        *describe_execution(job.execution),
        *describe_batch_norm(job.trainer.network, job.execution),
        describe_gradients(config.distributed.gradient_dtype, network),
    ]
    return "\n".join(lines)


def describe_recipe(recipe: Recipe) -> list[str]:
    optimizer, schedule = recipe.optimizer, recipe.schedule
    sample_frames = recipe.model["num_frames"] + (recipe.augmentation.get("stream") or {"burn_in": 0})["burn_in"]
    return [
        f"recipe     {recipe.num_rows} clips, {recipe.global_batch} per step = {recipe.steps_per_epoch:.2f} steps per epoch, "
        f"{recipe.epochs:.2f} epochs = {recipe.total_steps} steps",
        f"rate       {optimizer['lr']} at {optimizer['base_batch']} clips, {optimizer['scaling']} scaling -> "
        f"{schedule.peak:.6g} at {recipe.global_batch}; {schedule.warmup_steps} steps of warm-up, then {describe_decay(schedule)}",
        *_describe_stream(recipe),
        f"batch norm groups of {recipe.bn_group} clips ({recipe.bn_group * sample_frames} frames)",
    ]


def _describe_stream(recipe: Recipe) -> list[str]:
    stream = recipe.augmentation.get("stream")
    if stream is None:
        return []
    distances, scored = ", ".join(map(str, stream["distances"])), "both" if stream["score_burn_in"] else "the clip"
    return [
        f"stream     {stream['burn_in']} frames of another clip before each clip, frame distances {distances}; loss on each frame "
        f"of {scored} from number {stream['loss_from']} on"
    ]


def describe_decay(schedule: Schedule) -> str:
    """Describe the rate after the warm-up; milestones in steps."""
    if schedule.decay != "step":
        end = f" to {schedule.end:g}" if schedule.decay != "constant" else ""
        return f"{schedule.decay}{end}"
    milestones = ", ".join(map(str, sorted(schedule.milestone_steps)))
    return f"step x {schedule.factor:g} at {milestones or 'no step'}"


def describe_network(model: ModelConfig, size: int, network: NetworkEstimate) -> str:
    total, trained = network.parameters, network.trained_parameters
    frozen = f" ({trained / 1e6:.2f} M trained: model.partial_bn)" if trained < total else ""
    kind = "TSN" if model.shift == "none" else f"TSM ({model.shift}, {model.direction})"
    flow = f" on flow ({INPUT_CHANNELS[model.modality]} channels)" if model.modality == "flow" else ""
    return (
        f"network    {kind} {model.backbone}{flow}, {total / 1e6:.2f} M parameters{frozen}, "
        f"{network.clip_multiply_adds / 1e9:.3g} GFLOPs per clip of {model.num_frames} x {size} x {size} (multiply-adds)"
    )


def describe_numerics(numerics: NumericsConfig, evaluation_amp: str) -> str:
    """Describe precision and memory format of training, and precision of evaluation."""
    parts = [
        numerics.dtype,
        "no autocast" if numerics.amp == "off" else f"{numerics.amp} autocast",
        "channels_last" if numerics.channels_last else "contiguous",
        *(["TF32 on GPUs that have it"] if numerics.tf32 and numerics.dtype == "float32" else []),
        *(["deterministic"] if numerics.deterministic else []),
    ]
    evaluation = "no autocast" if evaluation_amp == "off" else f"{evaluation_amp} autocast"
    return f"numerics   {', '.join(parts)}; evaluation: {evaluation}"


def describe_execution(execution: Execution) -> list[str]:
    if execution.bn_ranks > 1:
        groups = f"each batch-norm group over {execution.bn_ranks} processes"
    else:
        groups = f"{execution.bn_ghosts} batch-norm group{'s' if execution.bn_ghosts > 1 else ''} within a micro-batch"
    return [
        f"execution  {execution.global_batch} clips = {execution.world} processes x {execution.micro_batch} clips x "
        f"{execution.accumulation} micro-steps; {groups}"
    ]


def describe_batch_norm(network: nn.Module, execution: Execution) -> list[str]:
    """Describe the messages of batch norm over processes; no line if each group lies within a process."""
    messages, num_bytes = batch_norm_messages(network, execution)
    return [f"bn sums    {messages} messages per step, {num_bytes / 1e6:.2f} MB per process"] if messages else []


def batch_norm_messages(network: nn.Module, execution: Execution) -> tuple[int, int]:
    """Return the all-reduces of batch norm per step, and the bytes that each process contributes. Frozen layers send none."""
    if execution.bn_ranks == 1:
        return 0, 0
    layers = [
        message_bytes(module.num_features, next(network.parameters()).dtype)
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    return 2 * len(layers) * execution.accumulation, sum(map(sum, layers)) * execution.accumulation


def describe_gradients(gradient_dtype: str, network: NetworkEstimate) -> str:
    return f"gradients  {network.gradient_bytes / 1e6:.1f} MB per step and process in the all-reduce ({gradient_dtype})"

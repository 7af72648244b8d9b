"""The derived numbers of a run, in words: printed once at start-up."""

from .job import Job
from .recipe import Execution, Recipe


def describe_plan(job: Job) -> str:
    """What is trained, where it runs, and how each number came about."""
    topology = job.backend.topology
    source = job.training_clips.source
    lines = [
        f"run        {job.folder.path.name}  recipe {job.recipe.fingerprint}  seed {job.recipe.seed}",
        *describe_recipe(job.recipe),
        f"world      {topology.size} x {job.backend.device.type}, backend {job.backend.name}, launcher {topology.launcher}, "
        f"decoder {source.decoder} in {job.config.pipeline.workers} workers a process",
        *describe_execution(job.execution),
        f"gradients  {gradient_bytes(job) / 1e6:.1f} MB a step and process on the wire ({job.config.distributed.wire})",
    ]
    return "\n".join(lines)


def describe_recipe(recipe: Recipe) -> list[str]:
    optimizer, schedule = recipe.optimizer, recipe.schedule
    return [
        f"recipe     {recipe.num_rows} clips, {recipe.global_batch} a step = {recipe.steps_per_epoch:.2f} steps an epoch, "
        f"{recipe.epochs:.2f} epochs = {recipe.total_steps} steps",
        f"rate       {optimizer['lr']} at {optimizer['base_batch']} clips, {optimizer['scaling']} scaling -> "
        f"{schedule.peak:.6g} at {recipe.global_batch}; {schedule.warmup_steps} steps of warm-up, then {schedule.decay}",
        f"batch norm groups of {recipe.bn_group} clips ({recipe.bn_group * recipe.model['num_frames']} frames)",
    ]


def describe_execution(execution: Execution) -> list[str]:
    if execution.bn_ranks > 1:
        groups = f"each batch-norm group over {execution.bn_ranks} processes"
    else:
        groups = f"{execution.bn_ghosts} batch-norm group{'s' if execution.bn_ghosts > 1 else ''} within a micro-batch"
    return [
        f"execution  {execution.global_batch} clips = {execution.world} processes x {execution.micro_batch} clips x "
        f"{execution.accumulation} micro-steps; {groups}"
    ]


def gradient_bytes(job: Job) -> int:
    """Bytes that each process contributes to a step's all-reduce."""
    numbers = sum(parameter.numel() for parameter in job.trainer.network.parameters())
    width = {"float16": 2, "float32": 8 if job.config.numerics.dtype == "float64" else 4}[job.config.distributed.wire]
    return numbers * width

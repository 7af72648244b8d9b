"""plan.py's estimate of a process's memory, and the peak that the device's allocator reports."""

import time

import torch

from training.config import schema
from training.planning.memory import StepCosts, step_costs
from training.recipe import Execution

from .report import Results
from .settings import Shape
from .steps import CLASSES, Way, build, set_switches
from .timing import free_memory

WAYS = {
    "numerics=gpu": (Way(), 8),
    "numerics=gpu, lars": (Way(optimizer="lars"), 8),
    "numerics=gpu, 32 clips": (Way(), 32),
    "numerics=reference": (Way(amp="off", channels_last=False), 8),
}


def memory(results: Results) -> None:
    """Measure the peak memory of two steps; on the CPU report only the estimate."""
    settings = results.settings
    cases = dict(list(WAYS.items())[:2]) if settings.tiny else WAYS
    for title, (way, clips) in results.each(cases):
        shape = settings.shape if settings.tiny else Shape("resnet50", clips, 8, 224)
        with results.row(title) as row:
            started_s = time.monotonic()
            set_switches(way)
            trainer, batches = build(way, shape, settings.device)
            costs = estimate(way, shape, trainer.execution)
            row["estimated_peak_gib"] = costs.peak_bytes / 2**30
            row["estimated_weights_gib"] = costs.weights_bytes / 2**30
            if settings.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                for step in range(2):
                    trainer.step(step, batches)
                torch.cuda.synchronize()
                row["allocated_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                row["reserved_peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
                row["allocated_by_estimated"] = row["allocated_peak_gib"] / row["estimated_peak_gib"]
            row["duration_s"] = time.monotonic() - started_s
        free_memory(settings.device)


def estimate(way: Way, shape: Shape, execution: Execution) -> StepCosts:
    """Return plan.py's estimate for a step of this kind."""
    return step_costs(
        schema.ModelConfig(backbone=shape.backbone, num_frames=shape.frames),
        CLASSES,
        shape.size,
        schema.NumericsConfig(amp=way.amp, channels_last=way.channels_last),
        schema.OptimizerConfig(name=way.optimizer, lr=0.1, base_batch=shape.clips),
        execution,
    )

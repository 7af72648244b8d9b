"""Lines at which the host waits for its device, and equivalence of GPU and CPU in float64."""

import os
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .report import Results
from .settings import CHECKOUT, TINY, Shape
from .steps import Way, build, set_switches

WAYS = {
    "fp32": Way(amp="off"),
    "bf16": Way(),
    "fp16": Way(amp="float16"),
    "bf16 lars": Way(optimizer="lars"),
    "bf16 lamb": Way(optimizer="lamb"),
    "bf16 clip, EMA": Way(clip_norm=1.0, ema_decay=0.9),
    "bf16 two ghosts": Way(ghosts=2),
    "fp16 over ranks": Way(amp="float16", over_ranks=True),
    "bf16 accumulation": Way(accumulation=2),
    "bf16 contiguous": Way(channels_last=False),
    "bf16 no shift": Way(network={"shift": "none"}),
}
EQUIVALENT = {
    "sgd": Way(amp="off", dtype="float64"),
    "contiguous": Way(amp="off", dtype="float64", channels_last=False),
    "two ghosts": Way(amp="off", dtype="float64", ghosts=2),
    "over ranks": Way(amp="off", dtype="float64", over_ranks=True),
    "lars": Way(amp="off", dtype="float64", optimizer="lars"),
    "lamb": Way(amp="off", dtype="float64", optimizer="lamb"),
    "clip, EMA": Way(amp="off", dtype="float64", clip_norm=0.5, ema_decay=0.9),
    "accumulation": Way(amp="off", dtype="float64", accumulation=2),
    "block shift": Way(amp="off", dtype="float64", network={"shift": "block"}),
    "past": Way(amp="off", dtype="float64", network={"direction": "past"}),
    "temporal pool": Way(amp="off", dtype="float64", network={"temporal_pool": True}),
}
SHAPE = Shape("resnet18", 4, 4, 32)
STEPS = 3
TOLERANCE = 1e-8
"""Maximum relative difference of all weights after STEPS steps; float64 rounds at 1e-16."""


def waits(results: Results) -> None:
    """Count the waits of a step after two warm-up steps, by line. On the CPU the steps run and none can wait."""
    settings = results.settings
    shape = TINY if settings.tiny else Shape("resnet18", 4, 4, 64)
    cases = {"fp32": WAYS["fp32"]} if settings.mode == "dry" else WAYS
    for title, way in results.each(cases):
        with results.row(title) as row:
            set_switches(way, benchmark=False)
            trainer, batches = build(way, shape, settings.device)
            for step in range(2):
                trainer.step(step, batches)
            with counted_waits(settings.device) as places:
                trainer.step(2, batches)
            row["waits"] = sum(places.values())
            row["places"] = dict(places)


@contextmanager
def counted_waits(device: str) -> Iterator[Counter[str]]:
    """Count waits for the device inside the context, by the project's line: torch warns of each (sync debug mode)."""
    places: Counter[str] = Counter()

    def count(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(CHECKOUT)]
            lines = [f"{os.path.relpath(frame.filename, CHECKOUT)}:{frame.lineno}" for frame in frames]
            places[" < ".join(reversed([line for line in lines if "first_light" not in line][-3:]))] += 1

    if device == "cpu":
        yield places
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        try:
            torch.cuda.set_sync_debug_mode("warn")
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def equivalence(results: Results) -> None:
    """Compare weights after three steps in float64 on CPU and GPU, from the same seeds."""
    tiny = results.settings.tiny
    cases = {title: EQUIVALENT[title] for title in ("sgd", "lars")} if tiny else EQUIVALENT
    shape = TINY if tiny else SHAPE
    for title, way in results.each(cases):
        with results.row(title) as row:
            on_cpu, on_device = (state_after(way, shape, device) for device in ("cpu", results.settings.device))
            row["relative"] = ((on_cpu - on_device).norm() / on_cpu.norm()).item()
            row["tolerance"] = TOLERANCE
            row["equal"] = row["relative"] <= TOLERANCE


def state_after(way: Way, shape: Shape, device: str) -> torch.Tensor:
    """Return all weights, running statistics and the steps' totals as one float64 vector on the CPU."""
    trainer, batches = build(way, shape, device)
    totals = [trainer.step(step, batches) for step in range(STEPS)]
    tensors = [tensor for tensor in trainer.network.state_dict().values() if tensor.is_floating_point()]
    averages = list(trainer.ema.tensors().values()) if trainer.ema else []
    return torch.cat([tensor.detach().reshape(-1).double().cpu() for tensor in (*tensors, *averages, *totals)])

"""Throughput of the project's training step: variants of the recipe, and numbers of clips."""

import json
from functools import partial
from typing import Any

import numpy as np

from tsm.flops import clip_multiply_adds
from tsm.networks import build_network

from .report import REPORT, Results
from .settings import Settings, Shape
from .shifts import SHIFTS, shift_replaced
from .steps import CLASSES, Way, stepper
from .timing import free_memory, time_steps

GPU = Way()
REFERENCE = Way(amp="off", channels_last=False)
WAYS = {
    "bf16 channels_last (numerics=gpu)": GPU,
    "bf16 channels_last, no shift": Way(network={"shift": "none"}),
    "fp16 channels_last": Way(amp="float16"),
    "bf16 channels_last, 32 clips": Way(shape={"clips": 32}),
    "fp16 channels_last, 32 clips": Way(amp="float16", shape={"clips": 32}),
    "bf16 channels_last, lars": Way(optimizer="lars"),
    "bf16 channels_last, batch norm over ranks (of one)": Way(over_ranks=True),
    "bf16 channels_last, two ghosts": Way(ghosts=2),
    "bf16 channels_last, block shift": Way(network={"shift": "block"}),
    "bf16 channels_last, clip, EMA": Way(clip_norm=20.0, ema_decay=0.999),
    "tf32 contiguous (numerics=reference)": REFERENCE,
    "tf32 channels_last": Way(amp="off"),
    "bf16 contiguous": Way(channels_last=False),
    "fp32 contiguous": Way(amp="off", channels_last=False, tf32=False),
    "bf16 channels_last, mobilenet_v2": Way(shape={"backbone": "mobilenet_v2"}),
    "bf16 channels_last, resnet101": Way(shape={"backbone": "resnet101"}),
    "bf16 channels_last, non-local": Way(network={"non_local": True}),
}
"""The most telling first. In a new precision, layout or number of clips, cuDNN times its algorithms for ten seconds."""
CLIPS = (8, 32, 64, 16, 4, 2, 1)


def speed(results: Results) -> None:
    """Measure clips/s and MFU of each way to compute, and of each shift with the first way."""
    settings = results.settings
    shifts = {f"bf16 channels_last, shift: {name}": name for name in SHIFTS if name not in ("ours", "none")}
    cases: dict[str, tuple[Way, str]] = {title: (way, "ours") for title, way in WAYS.items()}
    first = dict(list(cases.items())[:2])
    cases = first | ({} if settings.tiny else {title: (GPU, name) for title, name in shifts.items()} | cases)
    for title, (way, name) in results.each(cases):
        with shift_replaced(name):
            measure(results, title, way)


def measure(results: Results, title: str, way: Way) -> None:
    """Report one row: times, clips/s, TFLOP/s and MFU."""
    settings = results.settings
    with results.row(title) as row:
        shape = way.shape_on(settings)
        row |= time_steps(stepper(way, shape, settings.device), shape.clips, settings.device, settings.tiny)
        row["tflop_s"] = row["clips_s"] * step_flops(way, shape) / 1e12
        ceiling = ceiling_tflop_s(settings, way)
        row["mfu"] = row["tflop_s"] / ceiling if ceiling else None
    free_memory(settings.device)


def step_flops(way: Way, shape: Shape) -> int:
    """Return the FLOPs of one clip in a training step: 2 per multiply-add, and backward costs twice forward."""
    build = partial(build_network, shape.backbone, CLASSES, shape.frames, **way.network)
    return 6 * clip_multiply_adds(build, shape.size)


def ceiling_tflop_s(settings: Settings, way: Way) -> float | None:
    """Return the measured rate of a large matrix product in this precision, the base of MFU; None if facts has none."""
    try:
        phases = json.loads((settings.out / REPORT).read_text())["phases"]
        return float(phases["facts"]["results"][f"matrix product, {way.precision}"]["tflop_s"])
    except (OSError, KeyError):
        return None


def scaling(results: Results) -> None:
    """Measure step time over the number of clips in a step, and fit the line step_s = c0 + k * clips.

    cuDNN uses its heuristics here, because timing all its algorithms takes ten seconds for each number of clips.
    """
    settings = results.settings
    points: dict[str, dict[int, float]] = {}
    numbers = sorted(CLIPS)[:3] if settings.tiny else CLIPS
    ways = {"numerics=gpu": GPU, "numerics=reference": REFERENCE}
    cases = {f"{name}, {clips} clips": (name, clips) for name in ways for clips in numbers}
    for title, (name, clips) in results.each(cases):
        shape = Shape(settings.shape.backbone, clips, settings.shape.frames, settings.shape.size)
        with results.row(title) as row:
            step = stepper(ways[name], shape, settings.device, benchmark=False)
            row |= time_steps(step, clips, settings.device, settings.tiny)
            points.setdefault(name, {})[clips] = row["step_s"]
        free_memory(settings.device)
    for name, found in points.items():
        with results.row(f"{name}, fit") as row:
            row |= fit(found)


def fit(step_s: dict[int, float]) -> dict[str, Any]:
    """Fit step_s = c0 + k * clips by least squares of relative errors; return it with its largest relative error.

    Errors are relative, because a step of 64 clips would otherwise dominate the fit. Needs two points or more.
    """
    if len(step_s) < 2:
        raise ValueError(f"a line needs two points, got clips {list(step_s)}")
    clips, seconds = np.array(list(step_s), dtype=float), np.array(list(step_s.values()))
    k_s, c0_s = np.polyfit(clips, seconds, 1, w=1 / seconds)
    worst = np.abs((c0_s + k_s * clips) / seconds - 1).max()
    return {"c0_s": float(c0_s), "k_s": float(k_s), "worst_relative_error": float(worst), "points": len(step_s)}

"""Times on the device, by CUDA events, and on the host."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

BLOCKS = 5
BUDGET_S = 1.0
"""Seconds for the blocks of one measurement, after the warm-up."""
MOST_STEPS = 10
"""Maximum number of steps in a block."""


def device_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Return the device time of one call, the mean over `repeats` calls after a warm-up call."""
    function()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats / 1000


def time_steps(step: Callable[[], Any], clips: int, device: str, tiny: bool, warm_up: int = 4) -> dict[str, float]:
    """Return the median step time over blocks of steps, its range, and the host time to launch a step.

    A step is host-bound if its host time is close to its time. The result has seconds, clips/s and GiB.
    """
    if tiny:
        warm_up = 1
    for _ in range(warm_up):
        step()
    _synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    blocks, steps = (2, 1) if tiny else (BLOCKS, _steps_in_budget(step, device))
    spans_s, hosts_s = [], []
    for _ in range(blocks):
        span_s, host_s = _time_block(step, steps, device)
        spans_s.append(span_s / steps)
        hosts_s.append(host_s / steps)
    step_s = statistics.median(spans_s)
    measured = {
        "step_s": step_s, "lowest_s": min(spans_s), "highest_s": max(spans_s), "host_s": statistics.median(hosts_s),
        "clips_s": clips / step_s,
    }  # fmt: skip
    if device == "cuda":
        measured["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return measured


def _steps_in_budget(step: Callable[[], Any], device: str) -> int:
    span_s, _ = _time_block(step, 1, device)
    return max(1, min(MOST_STEPS, int(BUDGET_S / BLOCKS / span_s)))


def _time_block(step: Callable[[], Any], steps: int, device: str) -> tuple[float, float]:
    """Return (device seconds, host seconds until the last step was launched)."""
    if device == "cpu":
        started_s = time.perf_counter()
        for _ in range(steps):
            step()
        span_s = time.perf_counter() - started_s
        return span_s, span_s
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    started_s = time.perf_counter()
    for _ in range(steps):
        step()
    host_s = time.perf_counter() - started_s
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000, host_s


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free_memory(device: str) -> None:
    """Release the memory of a measurement before the next one."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()

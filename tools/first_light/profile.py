"""Kernels and operators of the recipe's step, by their share of the device's and of the host's time, beside a plain loop's."""

import gzip
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from .peers import BareLoop, bare_network
from .report import Results
from .steps import Way, stepper
from .timing import free_memory

STEPS = 3
ROWS = 25


def profile(results: Results) -> None:
    """Report what takes the most time, one row each; write the trace of the project's step to trace.json.gz."""
    settings = results.settings
    step = stepper(Way(), settings.shape, settings.device)
    profiler = profiled(step, settings.device)
    trace = settings.work / "trace.json"
    profiler.export_chrome_trace(str(trace))
    (settings.out / "trace.json.gz").write_bytes(gzip.compress(trace.read_bytes()))
    report(results, "step", profiler)
    del step, profiler
    free_memory(settings.device)
    loop = BareLoop(bare_network(settings.shape, "ours", settings.device), settings.shape, settings.device)
    report(results, "bare loop", profiled(loop.step, settings.device))


def profiled(step: Callable[[], Any], device: str) -> torch.profiler.profile:
    """Return the profile of STEPS steps after a warm-up."""
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(STEPS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    return profiler


def report(results: Results, name: str, profiler: torch.profiler.profile) -> None:
    """Report the sums, then what takes the most device time and what takes the most host time."""
    events = list(profiler.key_averages())
    with results.row(f"{name}: all") as row:
        row["device_ms_per_step"] = sum(event.self_device_time_total for event in events) / STEPS / 1000
        row["host_ms_per_step"] = sum(event.self_cpu_time_total for event in events) / STEPS / 1000
    for place in ("device", "host"):
        events.sort(key=lambda event: event.self_device_time_total if place == "device" else event.self_cpu_time_total)
        for number, event in enumerate(reversed(events[-ROWS:])):
            with results.row(f"{name}: {place} {number + 1:02d} {event.key[:120]}") as row:
                row["calls_per_step"] = event.count / STEPS
                row["device_us_per_step"] = event.self_device_time_total / STEPS
                row["host_us_per_step"] = event.self_cpu_time_total / STEPS

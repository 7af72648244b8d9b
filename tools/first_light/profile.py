"""Kernels of the recipe's step, by their share of the device time."""

import gzip

import torch
from torch.profiler import ProfilerActivity

from .report import Results
from .steps import Way, stepper

STEPS = 3
ROWS = 40


def profile(results: Results) -> None:
    """Report the kernels and operators that take the most time, one row each; write the trace to trace.json.gz."""
    settings = results.settings
    step = stepper(Way(), settings.shape, settings.device)
    for _ in range(1 if settings.tiny else 5):
        step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if settings.device == "cuda" else [])
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(STEPS):
            step()
        if settings.device == "cuda":
            torch.cuda.synchronize()
    events = profiler.key_averages()
    events.sort(key=lambda event: (event.self_device_time_total, event.self_cpu_time_total), reverse=True)
    with results.row("all") as row:
        row["device_ms_per_step"] = sum(event.self_device_time_total for event in events) / STEPS / 1000
        row["host_ms_per_step"] = sum(event.self_cpu_time_total for event in events) / STEPS / 1000
    for number, event in enumerate(events[:ROWS]):
        with results.row(f"{number + 1:02d} {event.key[:120]}") as row:
            row["calls_per_step"] = event.count / STEPS
            row["device_us_per_step"] = event.self_device_time_total / STEPS
            row["host_us_per_step"] = event.self_cpu_time_total / STEPS
    trace = settings.work / "trace.json"
    profiler.export_chrome_trace(str(trace))
    (settings.out / "trace.json.gz").write_bytes(gzip.compress(trace.read_bytes()))

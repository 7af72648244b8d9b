"""Record chosen steps of rank 0 with torch's profiler, as a trace for Perfetto or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfiler:
    """Profiles steps `first` to `last`, counted from 0, of those that this start takes."""

    def __init__(self, first: int, last: int, folder: Path, device: torch.device) -> None:
        self._first, self._last, self._folder = first, last, folder
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(activities=activities, record_shapes=True)
        self._runs = False

    def step(self, step: int) -> str | None:
        """Call this as a step begins. Returns a line to log when the trace is written."""
        if step > self._last:
            return self.close()
        if not self._runs and self._first <= step <= self._last:
            self._profile.start()
            self._runs = True
        return None

    def close(self) -> str | None:
        """Write the trace if steps are being profiled."""
        if not self._runs:
            return None
        self._runs = False
        self._profile.stop()
        path = self._folder / f"steps-{self._first:08d}-{self._last:08d}.json"
        try:
            self._folder.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            return f"profile: cannot write {path}: {error}; training continues"
        return (
            f"profile: steps {self._first} to {self._last} of rank 0 are in {path}; open it at https://ui.perfetto.dev"
        )

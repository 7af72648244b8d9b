"""The phases, most informative first, with their shares of the time, and the loop that runs each in its own process.

CUDA errors, leaked memory and process-wide switches end with a phase's process and cannot affect the next phase.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .processes import run
from .report import REPORT, RUNNING, write_json
from .settings import Settings

LEAST_S = 4.0
"""Minimum time in seconds with which a phase starts."""


TINY_ENVIRONMENT = {
    # Several processes with many threads oversubscribe few cores, and a tiny network does not profit from a second thread.
    "OMP_NUM_THREADS": "1",
    # The fake GPU can load compiled kernels only through Triton's own launcher, not through Inductor's.
    "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0",
}


@dataclass(frozen=True)
class Phase:
    """A phase: `function` is `module:name` and takes a Results; `share_s` is its time in a run of DEFAULT_LIMIT_S."""

    name: str
    function: str
    share_s: float


DEFAULT_LIMIT_S = 530.0

PHASES = (
    Phase("facts", "tools.first_light.facts:facts", 30),
    Phase("waits", "tools.first_light.correctness:waits", 20),
    Phase("equivalence", "tools.first_light.correctness:equivalence", 20),
    Phase("gpu_tests", "tools.first_light.gpu_tests:gpu_tests", 90),
    Phase("speed", "tools.first_light.speed:speed", 85),
    Phase("scaling", "tools.first_light.speed:scaling", 45),
    Phase("peers", "tools.first_light.peers:peers", 35),
    Phase("ranks", "tools.first_light.jobs:ranks", 45),
    Phase("jobs", "tools.first_light.jobs:jobs", 50),
    Phase("operators", "tools.first_light.operators:operators", 12),
    Phase("memory", "tools.first_light.memory:memory", 15),
    Phase("profile", "tools.first_light.profile:profile", 13),
    Phase("benchmarks", "tools.first_light.jobs:benchmarks", 30),
    Phase("compiled", "tools.first_light.peers:compiled", 40),
)


def run_phases(phases: Sequence[Phase], settings: Settings, report: dict[str, Any]) -> None:
    """Run all phases until the settings' deadline. The report on disk is complete before each phase starts.

    A phase's limit is its share of the remaining time. So a phase that hangs does not use the time of others, and unused time
    goes to all later phases.
    """
    report["phases"] = {phase.name: {"outcome": "not started"} for phase in phases}
    write_json(settings.out / REPORT, report)
    for number, phase in enumerate(phases):
        limit_s = settings.left_s() * phase.share_s / sum(later.share_s for later in phases[number:])
        entry = run_phase(phase, settings, limit_s)
        report["phases"][phase.name] = entry
        write_json(settings.out / REPORT, report)
        print(f"{phase.name}: {entry['outcome']} in {entry['duration_s']:.1f} s of {limit_s:.1f}", flush=True)


def run_phase(phase: Phase, settings: Settings, limit_s: float) -> dict[str, Any]:
    """Run one phase in its own process; return its entry for the report."""
    entry: dict[str, Any] = {"outcome": "no time", "duration_s": 0.0, "limit_s": round(limit_s, 1), "results": {}}
    if limit_s < LEAST_S:
        return entry
    running = settings.out / RUNNING
    running.unlink(missing_ok=True)
    # The phase stops earlier, so that it can still write its results.
    own = replace(settings, deadline_s=time.monotonic() + limit_s - min(2.0, limit_s / 10))
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        "tools.first_light",
        "--phase",
        phase.function,
        *own.arguments(),
    ]
    ended = run(command, limit_s, TINY_ENVIRONMENT if settings.tiny else {})
    entry |= {"outcome": ended.outcome, "duration_s": ended.duration_s}
    if running.exists():
        entry["results"] = json.loads(running.read_text())
        running.unlink()
    if ended.outcome != "ok":
        entry["output"] = ended.output[-6000:]
    return entry

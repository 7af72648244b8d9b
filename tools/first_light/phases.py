"""The phases with their shares of the time, and the loop that runs each in a process of its own.

CUDA errors, leaked memory and process-wide switches end with a phase's process and cannot affect the next phase. The processes
are forked from this one, which has imported what they need: a start from nothing takes a quarter of a minute on a slow host.
"""

import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from .forks import run_forked
from .processes import Ended
from .report import REPORT, Results, running_file, write_json
from .settings import Settings

LEAST_S = 4.0
"""Minimum time in seconds with which a phase starts."""


@dataclass(frozen=True)
class Phase:
    """A phase: `function` is `module:name` and takes a Results; `share_s` is its time in a run of DEFAULT_LIMIT_S.

    Neighbours with the same `side_by_side` run at the same time: they check and time nothing. On one GPU, a dozen processes with
    CUDA contexts are ten times slower each, so there are not more of them.
    """

    name: str
    function: str
    share_s: float
    side_by_side: str = ""


DEFAULT_LIMIT_S = 520.0

PHASES = (
    Phase("facts", "tools.first_light.facts:facts", 20),
    Phase("waits", "tools.first_light.correctness:waits", 60, side_by_side="tests"),
    Phase("equivalence", "tools.first_light.correctness:equivalence", 60, side_by_side="tests"),
    Phase("gpu_tests", "tools.first_light.gpu_tests:gpu_tests", 60, side_by_side="tests"),
    Phase("ranks", "tools.first_light.jobs:ranks", 75, side_by_side="jobs"),
    Phase("jobs", "tools.first_light.jobs:jobs", 75, side_by_side="jobs"),
    Phase("speed", "tools.first_light.speed:speed", 80),
    Phase("scaling", "tools.first_light.speed:scaling", 40),
    Phase("peers", "tools.first_light.peers:peers", 35),
    Phase("profile", "tools.first_light.profile:profile", 15),
    Phase("memory", "tools.first_light.memory:memory", 15),
    Phase("operators", "tools.first_light.operators:operators", 15),
    Phase("dali_tests", "tools.first_light.gpu_tests:dali_tests", 45, side_by_side="dali"),
    Phase("dali_job", "tools.first_light.jobs:dali_job", 45, side_by_side="dali"),
    Phase("input", "tools.first_light.video_input:video_input", 40),
    Phase("benchmarks", "tools.first_light.jobs:benchmarks", 30),
    Phase("compiled", "tools.first_light.peers:compiled", 50),
)


def groups_of(phases: Sequence[Phase]) -> list[list[Phase]]:
    """Return the phases in groups that run side by side."""
    return [list(group) for _, group in groupby(phases, lambda phase: phase.side_by_side or phase.name)]


def share_s(group: Sequence[Phase]) -> float:
    return max(phase.share_s for phase in group)


def run_phases(phases: Sequence[Phase], settings: Settings, report: dict[str, Any]) -> None:
    """Run all phases until the settings' deadline. The report on disk is complete before each group starts.

    A group's limit is its share of the remaining time. So a phase that hangs does not use the time of others, and unused time
    goes to all later phases.
    """
    report["phases"] = {phase.name: {"outcome": "not started"} for phase in phases}
    write_json(settings.out / REPORT, report)
    groups = groups_of(phases)
    for number, group in enumerate(groups):
        limit_s = settings.left_s() * share_s(group) / sum(map(share_s, groups[number:]))
        for name, entry in run_group(group, settings, limit_s):
            report["phases"][name] = entry
            write_json(settings.out / REPORT, report)
            print(f"{name}: {entry['outcome']} in {entry['duration_s']:.1f} s of {limit_s:.1f}", flush=True)


def run_group(group: Sequence[Phase], settings: Settings, limit_s: float) -> list[tuple[str, dict[str, Any]]]:
    """Run phases side by side; return their entries for the report."""
    if limit_s < LEAST_S:
        ended = {"outcome": "no time", "duration_s": 0.0, "limit_s": round(limit_s, 1), "results": {}}
        return [(phase.name, dict(ended)) for phase in group]
    # A phase stops earlier, so that it can still write its results.
    own = replace(settings, deadline_s=time.monotonic() + limit_s - min(2.0, limit_s / 10))
    functions = {phase.name: partial(run_phase, phase, own) for phase in group}
    outcomes = dict(run_forked(functions, lambda _: limit_s, at_once=len(group)))
    return [(phase.name, entry_of(phase, own, limit_s, outcomes[phase.name])) for phase in group]


def run_phase(phase: Phase, settings: Settings) -> None:
    """Run a phase in this process, which is its own."""
    module, _, name = phase.function.partition(":")
    getattr(importlib.import_module(module), name)(Results(settings, phase.name))


def entry_of(phase: Phase, settings: Settings, limit_s: float, ended: Ended) -> dict[str, Any]:
    """Return the report's entry for a phase that has ended."""
    entry: dict[str, Any] = {"outcome": ended.outcome, "duration_s": ended.duration_s, "limit_s": round(limit_s, 1)}
    running = running_file(settings, phase.name)
    entry["results"] = json.loads(running.read_text()) if running.exists() else {}
    running.unlink(missing_ok=True)
    if ended.outcome != "ok":
        entry["output"] = ended.output[-6000:]
    return entry

"""Torch's profiler over chosen steps."""

import json
from pathlib import Path

import torch

from training.telemetry.step_profile import StepProfiler


def test_only_the_chosen_steps_are_in_the_trace(tmp_path: Path) -> None:
    profiler = StepProfiler(1, 2, tmp_path / "profile", torch.device("cpu"))
    work = [torch.sin, torch.cos, torch.tan, torch.exp]
    lines = []
    for step, function in enumerate(work):
        lines.append(profiler.step(step))
        function(torch.ones(1))
    trace = tmp_path / "profile" / "steps-00000001-00000002.json"
    assert lines[:3] == [None] * 3 and str(trace) in (lines[3] or "") and profiler.close() is None
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::cos", "aten::tan"} <= names and not {"aten::sin", "aten::exp"} & names


def test_a_run_that_ends_within_them_has_its_trace(tmp_path: Path) -> None:
    profiler = StepProfiler(0, 9, tmp_path / "profile", torch.device("cpu"))
    profiler.step(0)
    torch.cos(torch.ones(1))
    assert "profile: steps 0 to 9" in (profiler.close() or "")
    assert list((tmp_path / "profile").glob("*.json"))


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file in the folder's place")
    profiler = StepProfiler(0, 0, tmp_path / "profile", torch.device("cpu"))
    profiler.step(0)
    assert "training continues" in (profiler.step(1) or "")

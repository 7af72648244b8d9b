"""The page of all benchmarks: verdicts against targets, failed programs, and the time to an accuracy."""

import json
from pathlib import Path

import pytest

from benchmarks.end_to_end import Evaluated, row_of, time_to
from benchmarks.page import TARGETS, Result, as_html, as_json, lines_of
from benchmarks.run_all import programs
from runtime.checkout import CHECKOUT


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.10, 0.20, "met"), (0.15, 0.21, "unclear"), (0.21, 0.40, "MISSED")]
)
def test_the_whole_interval_decides(low: float, high: float, verdict: str) -> None:
    row = {"benchmark": "checkpoint", "backbone": "resnet50", "stall_ratio": {"median": 0.2, "low": low, "high": high}}
    (line,) = lines_of("checkpoint", [row])
    assert (line.label, line.target_text, line.verdict) == ("backbone=resnet50", "at most 0.2", verdict)


def test_missed_targets_and_failed_programs_come_first() -> None:
    missed = {"optimizer": "LARS, ours", "ratio_to_timm": {"median": 0.7, "low": 0.6, "high": 0.8}, "cpu": "<EPYC>"}
    results = [
        Result("optimizer", "python benchmarks/optimizer.py", 0, 3.0, [missed]),
        Result("step", "python benchmarks/step.py", 1, 2.0, [], "no <horovodrun>"),
    ]
    page = as_html(results)
    assert (
        page.index("MISSED: optimizer")
        < page.index("NOT RUN: step ended with 1: no &lt;horovodrun&gt;")
        < page.index("<h2>")
    )
    assert "&lt;EPYC&gt;" in page and "python benchmarks/optimizer.py" in page and "timm&#x27;s LARS" in page
    (line,) = json.loads(json.dumps(as_json(results)))[0]["lines"]
    assert (line["verdict"], line["target"], line["low"]) == ("MISSED", "at most 0.5", 0.6)


def test_a_row_may_bring_its_own_target() -> None:
    rows = [
        {"check": "memory, worst error %", "value": value, "target": 6.0, "met": value <= 6} for value in (4.1, 7.0)
    ]
    lines = lines_of("simulator", [{"network": "resnet50", "error_percent": 4.1}, *rows])
    found = [(line.label, line.target_text, line.verdict) for line in lines]
    assert found == [("memory, worst error %", "at most 6", verdict) for verdict in ("met", "MISSED")]


def test_every_target_is_of_a_program() -> None:
    assert "simulator" in programs()
    assert {target.benchmark for target in TARGETS} <= set(programs())
    for target in TARGETS:
        source = (CHECKOUT / "benchmarks" / f"{target.benchmark}.py").read_text()
        assert f'"{target.key}"' in source


def test_time_to_an_accuracy(tmp_path: Path) -> None:
    ours = [Evaluated(10.0, 60.0), Evaluated(20.0, 96.0), Evaluated(30.0, 94.0)]
    peer = [Evaluated(25.0, 70.0), Evaluated(40.0, 95.0)]
    never = [Evaluated(50.0, 90.0)]
    assert (time_to(95.0, ours), time_to(95.0, peer), time_to(95.0, never)) == (20.0, 40.0, None)
    row = row_of({"ours": [ours, ours], "peer": [peer, never]}, 95.0, 6)
    assert row["time_ratio"].median == 0.5
    assert row["missed"] == {"ours": 0, "peer": 1}
    assert "time_ratio" not in row_of({"ours": [ours], "peer": [never]}, 95.0, 6)

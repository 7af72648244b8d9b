"""The report of a run that ended in any way: status, rates, plan beside measurement, limits of axes, and the MLPerf-style log."""

import importlib
import importlib.util
import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from runtime.lease import identity
from training.report import charts
from training.report.command import run_report
from training.report.comparison import NO_PLAN, compare
from training.report.history import History
from training.report.rates import rates_of
from training.report.robust_axis import robust_limits
from training.report.status import Status, read_status

GONE = "rank 1 on n17 is gone: its process was killed or crashed, or its node failed, at step 41, phase step"


class Folder:
    """A run folder in the making; records are one second apart."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path, self.time_s = path, 1_000.0

    def write(self, kind: str, step: int, **values: Any) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": kind, "time_s": self.time_s, "step": step, **values}) + "\n")
        self.time_s += 1.0

    def outcome(self, exit_code: int, reason: str) -> None:
        (self.path / "outcome.json").write_text(json.dumps({"exit_code": exit_code, "reason": reason, "time_s": 1.0}))

    def failure(self, name: str, text: str) -> None:
        place = self.path / "failures" / "20260102-030405"
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)

    def status(self) -> Status:
        return read_status(self.path, History.read(self.path))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    run = Folder(tmp_path / "mine")
    run.write("start", 0, world_size=2, backend="torch")
    for step in (10, 20, 30, 40):
        usual = {"loss": 2.0, "top1_percent": 30.0, "step_s": 0.5, "clips_per_s": 32.0, "input_wait_percent": 25.0}
        run.write("train", step, epoch=step / 10, **usual)
    return run


def test_a_rank_that_disappears_was_killed_by_sigkill(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """No process can log SIGKILL, and a process logs every other signal, so SIGKILL is what is left."""
    folder.outcome(75, GONE)
    folder.failure("stacks.txt", "==== rank 1: <stuck> in all_reduce")
    folder.write("checkpoint", 30, duration_s=0.1)
    assert run_report([str(folder.path)], "") == 0
    printed = capsys.readouterr().out
    assert "mine: killed after 40 steps" in printed
    assert "signal: SIGKILL" in printed
    assert "last step: 40 by the records, checkpoint: step 30, failed at step 41, phase step" in printed
    page = (folder.path / "report.html").read_text()
    assert page.index("is gone") < page.index("&lt;stuck&gt; in all_reduce") < page.index('class="cards"')


@pytest.mark.parametrize(
    ("text", "name"),
    [("Fatal Python error: Segmentation fault", "SIGSEGV"), ("Fatal Python error: Bus error", "SIGBUS")],
)
def test_a_crash_is_named_by_the_rank_s_log(folder: Folder, text: str, name: str) -> None:
    folder.outcome(75, GONE)
    folder.failure("rank-00001.log", f"starting\n{text}\n\nCurrent thread 0x1:\n")
    assert folder.status().signal == name
    # Another rank's log says nothing of this one.
    folder.outcome(75, GONE.replace("rank 1", "rank 0"))
    assert folder.status().signal == "SIGKILL"


@pytest.mark.parametrize(
    ("code", "reason", "log", "word", "signal"),
    [
        (0, "done", "", "stopped", None),
        (75, "stopped in good order", "stopped by SIGUSR1 after step 40, with a checkpoint", "stopped", "SIGUSR1"),
        (130, "rank 0 on n17 stopped by SIGINT with nothing to save", "", "stopped", "SIGINT"),
        (130, "rank 0 on a stopped by a second Ctrl-C, without a checkpoint", "", "stopped", "SIGINT"),
        (1, "rank 0 on n17 failed: ValueError: x", "stopped by SIGTERM after step 3, earlier", "failed", None),
        (75, "rank 3 on n2 hangs at step 7, phase input", "", "failed", None),
    ],
)
def test_outcomes(folder: Folder, code: int, reason: str, log: str, word: str, signal: str | None) -> None:
    folder.outcome(code, reason)
    (folder.path / "log.txt").write_text(log)
    status = folder.status()
    assert (status.word, status.signal) == (word, signal)
    assert reason == "done" or reason in status.reason


def test_no_word_at_all(folder: Folder) -> None:
    """While the lock's holder lives the run runs. A lock of a process that is gone, or none, means that all was killed."""
    lock = folder.path / "train.lock"
    lock.write_text(identity())
    assert folder.status().word == "running"
    lock.write_text(json.dumps(json.loads(identity()) | {"started": 1}))
    assert (folder.status().word, folder.status().signal) == ("killed", "SIGKILL")
    lock.unlink()
    assert folder.status().word == "killed"


@pytest.mark.parametrize("damage", ["{", "[]", '{"exit_code": "x"}'])
def test_a_damaged_outcome_is_no_outcome(folder: Folder, damage: str) -> None:
    (folder.path / "outcome.json").write_text(damage)
    assert folder.status().word == "killed"


def test_what_is_no_run_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_report([str(tmp_path / "missing")], "") == 2
    assert run_report([str(tmp_path)], "") == 2
    assert capsys.readouterr().err.count("Fix: report.py outputs/NAME") == 2
    assert list(tmp_path.iterdir()) == []


def test_three_rates(folder: Folder) -> None:
    """40 steps of 0.5 s at 32 clips/s are 640 clips in 20 s, a quarter of it input stall, of a job of 40 s."""
    folder.time_s = 1_040.0
    folder.write("end", 40, exit_code=0)
    rates = rates_of(History.read(folder.path))
    assert rates is not None
    assert (rates.whole_job, rates.training) == (pytest.approx(16.0), pytest.approx(32.0))
    assert rates.compute == pytest.approx(640 / 15)


def test_without_a_plan_the_page_says_how_to_make_one(folder: Folder) -> None:
    found = compare(folder.path, History.read(folder.path))
    assert found.note == NO_PLAN
    assert [row.cells[1] for row in found.rows] == ["–"] * len(found.rows)


def test_plan_beside_measurement(folder: Folder) -> None:
    terms = {"clips": 10.0, "c0": 2.0, "jitter": 1.0, "gradients": 3.0, "input": 4.0, "start-up": 6.0}
    plan = {
        "recipe": {"total_steps": 40},
        "steps_s": 24.0,
        "time_to_train_s": {"low": 20.0, "centre": 30.0, "high": 39.0},
        "terms": {name: {"seconds": seconds} for name, seconds in terms.items()},
    }
    (folder.path / "plan.json").write_text(json.dumps(plan))
    folder.time_s = 1_040.0
    folder.write("end", 40, exit_code=0)
    found = compare(folder.path, History.read(folder.path))
    rows = {row.term: row.cells[1:4] for row in found.rows}
    assert rows["a step"] == ["600.0 ms/step", "500.0 ms/step", "0.83"]
    assert rows["input stall"] == ["100.0 ms/step", "125.0 ms/step", "1.25"]
    assert rows["compute"] == ["300.0 ms/step", "–", "–"]
    assert rows["whole job"] == ["30.0 s", "40.0 s", "1.33"]
    assert "above the interval" in found.note


def test_start_up_is_from_the_launcher_to_the_first_step(tmp_path: Path) -> None:
    run = Folder(tmp_path / "x")
    for kind, time_s in (("job_start", 90.0), ("start", 100.0), ("first_step", 104.0)):
        run.time_s = time_s
        run.write(kind, 0, **({"duration_s": 3.0} if kind == "first_step" else {}))
    rows = {row.term: row.measured for row in compare(run.path, History.read(run.path)).rows}
    assert rows["start-up"] == pytest.approx(11.0)
    assert rows["whole job"] == pytest.approx(14.0)


def test_one_extreme_loss_does_not_set_the_axis() -> None:
    usual = [2.3 * 0.9**step for step in range(40)]
    limits = robust_limits([*usual, 36.0])
    assert limits is not None and limits.low < min(usual) and 2.3 < limits.high < 2.6
    assert robust_limits(usual) is None
    assert robust_limits([1.0, 2.0, 0.5, 0.2]) is None
    assert robust_limits([1.0, 1.0, 1.0, 1.0, 36.0, math.nan]) is not None
    assert robust_limits([0.0] * 8) is None


def test_colours_stay_apart_for_colour_blind_readers() -> None:
    """Machado et al. (2009), severity 1: the colours of any two curves differ, seen with each kind of colour blindness."""
    kinds = {
        "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        "protanopia": (
            (0.152286, 1.052583, -0.204868),
            (0.114503, 0.786281, 0.099216),
            (-0.003882, -0.048116, 1.051998),
        ),
        "deuteranopia": (
            (0.367322, 0.860646, -0.227968),
            (0.280085, 0.672501, 0.047413),
            (-0.011820, 0.042940, 0.968881),
        ),
        "tritanopia": (
            (1.255528, -0.076749, -0.178779),
            (-0.078411, 0.930809, 0.147602),
            (0.004733, 0.691367, 0.303900),
        ),
    }
    for first, second in combinations((charts.BLUE, charts.ORANGE, charts.GREEN, charts.PURPLE), 2):
        for kind, matrix in kinds.items():
            seen = [
                [sum(weight * value for weight, value in zip(row, _linear(colour), strict=True)) for row in matrix]
                for colour in (first, second)
            ]
            assert math.dist(*seen) > 0.1, (kind, first, second)


def _linear(colour: str) -> list[float]:
    values = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]


def test_mlperf_style_log(folder: Folder, tmp_path: Path) -> None:
    """By the rules of mlcommons/logging, and by its own parser where that is installed."""
    (folder.path / "config.yaml").write_text("name: smoke\nseed: 3\nbatch:\n  global_batch: 16\n")
    folder.write("evaluation", 40, epoch=4.0, duration_s=2.5, top1_percent=62.5)
    folder.write("train", 50, loss=math.nan, clips_per_s=1.0)
    folder.outcome(75, GONE)
    log = tmp_path / "mllog.txt"
    assert run_report([str(folder.path), "--mllog", str(log)], "") == 0
    lines = log.read_text().splitlines()
    events = [json.loads(line.removeprefix(":::MLLOG "), parse_constant=pytest.fail) for line in lines]
    assert all(line.startswith(":::MLLOG ") for line in lines)
    for event in events:
        assert event.keys() == {"namespace", "time_ms", "event_type", "key", "value", "metadata"}
        assert event["metadata"].keys() >= {"file", "lineno"}
        kind = {"start": "INTERVAL_START", "stop": "INTERVAL_END"}.get(event["key"].rpartition("_")[2], "POINT_IN_TIME")
        assert event["event_type"] == kind
    times = [event["time_ms"] for event in events]
    assert times == sorted(times)
    values = {event["key"]: event["value"] for event in events}
    assert (values["seed"], values["global_batch_size"], values["eval_accuracy"]) == (3, 16, 0.625)
    assert values["run_stop"] == {"status": "aborted"}
    keys = [event["key"] for event in events]
    assert keys.index("init_stop") < keys.index("run_start") < keys.index("block_start") < keys.index("block_stop")
    assert keys.index("block_stop") <= keys.index("eval_start") < keys.index("eval_accuracy") < keys.index("eval_stop")
    if importlib.util.find_spec("mlperf_logging") is not None:
        parser = importlib.import_module("mlperf_logging.compliance_checker.mlp_parser")
        parsed, errors = parser.parse_file(str(log), ruleset="4.1.0")
        assert (len(parsed), errors) == (len(lines), [])

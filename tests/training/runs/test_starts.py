"""Starts of a run: the recorded history, and the refusal of restarts without progress."""

import json
import os
from pathlib import Path

import pytest

from training.errors import NoProgressError
from training.runs.restarts import check_progress, read_starts, record_start


class Run:
    """Run folder that records the starts and outcomes of the test."""

    def __init__(self, folder: Path) -> None:
        self.provenance, self.outcome = folder / "provenance.json", folder / "outcome.json"

    def start(self, first_step: int) -> None:
        check_progress(self.provenance, self.outcome, first_step)
        record_start(self.provenance, self.outcome, {"first_step": first_step})

    def end(self, exit_code: int | None, reason: str = "a fault") -> None:
        if exit_code is not None:
            self.outcome.write_text(json.dumps({"exit_code": exit_code, "reason": reason, "time_s": 1.0}))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize("exit_code", [1, 75, None])
def test_the_third_restart_at_the_same_step_is_refused(run: Run, exit_code: int | None) -> None:
    for _ in range(3):
        run.start(4)
        run.end(exit_code)
    with pytest.raises(NoProgressError, match=r"the last 3 starts all began at step 4.*allow_no_progress=true"):
        run.start(4)


def test_the_reasons_are_told_in_order(run: Run) -> None:
    for reason in ("first", "second", None):
        run.start(0)
        run.end(None if reason is None else 75, reason or "")
    with pytest.raises(NoProgressError, match="first; second; no outcome recorded"):
        run.start(0)


def test_progress_begins_the_count_anew(run: Run) -> None:
    for first_step in (0, 0, 0, 5, 5, 5, 9):
        run.start(first_step)
        run.end(75)
    assert [start["first_step"] for start in read_starts(run.provenance, run.outcome)] == [0, 0, 0, 5, 5, 5, 9]


@pytest.mark.parametrize("exit_code", [0, 2, 3, 130])
def test_ends_that_a_user_brings_about_do_not_count(run: Run, exit_code: int) -> None:
    for _ in range(6):
        run.start(0)
        run.end(exit_code)


def test_a_signal_before_the_first_step_does_not_count(run: Run) -> None:
    for _ in range(6):
        run.start(0)
        run.end(75, "rank 1 on n17 stopped by SIGTERM with nothing to save. Fix: run the same command again")


def test_each_start_knows_how_it_ended(run: Run) -> None:
    run.start(0)
    run.end(75, "rank 3 on n17 is gone")
    run.start(8)
    assert not run.outcome.exists()
    first, second = read_starts(run.provenance, run.outcome)
    assert (first["ended"]["exit_code"], first["ended"]["reason"]) == (75, "rank 3 on n17 is gone")
    assert "ended" not in second


def test_a_kill_while_a_start_is_noted_leaves_the_earlier_ones(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.start(0)

    def killed(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            record_start(run.provenance, run.outcome, {"first_step": 0})
    assert len(read_starts(run.provenance, run.outcome)) == 1
    run.start(0)
    assert len(read_starts(run.provenance, run.outcome)) == 2


@pytest.mark.parametrize("name", ["provenance", "outcome"])
@pytest.mark.parametrize("text", [b"", b"[{", b"\xff\xfe", b"\x00" * 40])
def test_a_file_that_a_crash_left_empty_stops_no_later_start(
    run: Run, name: str, text: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    record_start(run.provenance, run.outcome, {"first_step": 0})
    broken: Path = getattr(run, name)
    broken.write_bytes(text)
    check_progress(run.provenance, run.outcome, 0)
    record_start(run.provenance, run.outcome, {"first_step": 7})
    assert read_starts(run.provenance, run.outcome)[-1] == {"first_step": 7}
    assert broken.with_name(broken.name + ".broken").read_bytes() == text
    assert capsys.readouterr().err.count(f"{broken} is empty or broken") == 1

"""The report that the monitor starts when a job has failed."""

import json
from pathlib import Path

import pytest

from distributed.health.rank_log import RankLog

pytestmark = pytest.mark.slow


def test_a_failed_run_gets_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the job's environment would stop Python: the report runs without it."""
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    log = RankLog("monitor", "n17")
    log.open_in(tmp_path)
    # Without a configuration the folder holds no run.
    assert log.start_report() is None
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "outcome.json").write_text(
        json.dumps({"exit_code": 3, "reason": "rank 1 on n17 failed: x", "time_s": 1.0})
    )
    report = log.start_report()
    assert report is not None and report.wait(110) == 0, (tmp_path / "log.txt").read_text()
    assert "rank 1 on n17 failed: x (exit code 3)" in (tmp_path / "report.html").read_text()
    log.close()

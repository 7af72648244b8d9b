"""A run whose terminal is gone and whose standard error is on a full disk trains to its end; its log is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.jobs import make_clips
from tests.helpers.worlds import CHECKOUT
from training.telemetry.records import read_metrics

pytestmark = pytest.mark.slow


def test_a_run_whose_output_fails_trains_to_its_end(tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "clips")
    command = [sys.executable, "train.py", "experiment=smoke", "logger=disabled", "logger.every_steps=1"]
    command += "pipeline.workers=1 pipeline.size=32 model.num_frames=4 batch.global_batch=8 max_steps=4".split()
    command += [f"data.root={clips}", f"outputs={tmp_path}", "run_id=x"]
    script = 'set -o pipefail; "$@" 2>/dev/full | head -n 1'
    ended = subprocess.run(
        ["bash", "-c", script, "bash", *command], cwd=CHECKOUT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0 and ended.stdout.count("\n") == 1
    assert json.loads((tmp_path / "x/outcome.json").read_text())["exit_code"] == 0
    records = read_metrics(tmp_path / "x/metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4]
    log = (tmp_path / "x/log.txt").read_text()
    assert all(f"step      {step}  loss" in log for step in (1, 2, 3, 4))

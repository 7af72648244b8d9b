"""The start of a job: the batch script's, or the launcher's, or the process' own."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.checkout import CHECKOUT
from runtime.job_start import job_start_s

CHILD = "import sys; from runtime.job_start import job_start_s; print(job_start_s(sys.argv[1]))"


def test_the_batch_scripts_start_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSM_JOB_START", "1795837138.25")
    assert job_start_s("srun") == 1795837138.25
    monkeypatch.setenv("TSM_JOB_START", "yesterday")
    assert job_start_s("none") != 1795837138.25


def test_a_launcher_started_before_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank is a grandchild, started a while after its launcher."""
    monkeypatch.delenv("TSM_JOB_START", raising=False)
    launcher = tmp_path / "torchrun"
    rank = [sys.executable, "-c", CHILD]
    launcher.write_text(f"""
import subprocess, time
time.sleep(1)
for launcher in ("torchrun", "none"):
    subprocess.run(["sh", "-c", '"$@"; :', "sh", *{rank!r}, launcher], check=True)
""")
    began_s = time.time()
    done = subprocess.run([sys.executable, launcher], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    of_launcher_s, of_rank_s = map(float, done.stdout.split())
    # The kernel counts starts in hundredths of a second.
    assert began_s - 0.1 < of_launcher_s < of_rank_s - 0.9 < time.time()

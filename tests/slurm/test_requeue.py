"""The end of a batch script: the outcome in the run folder decides, and nothing in it is executed."""

import json
import subprocess
from pathlib import Path

import pytest

from runtime.checkout import CHECKOUT

CONCLUDE = """
set -euo pipefail
say() { echo "$*"; }
source slurm/requeue.sh
slurm_ends_it() { false; }
write_report() { echo reported >"$folder/reported"; }
requeue() { echo requeued; exit 75; }
folder=$1 srun_code=$2 outcome_before=$3 received=$4 restarts=0 run_id=x
conclude
"""


def conclude(
    folder: Path, srun_code: int = 137, before: str = "", received: str = ""
) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", CONCLUDE, "bash", str(folder), str(srun_code), before, received]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)


def outcome(exit_code: int, reason: str = "done") -> str:
    return json.dumps({"exit_code": exit_code, "reason": reason, "time_s": 1.0}) + "\n"


@pytest.mark.parametrize("exit_code", [0, 1, 2, 3, 5, 75, 130])
def test_a_start_ends_with_its_outcome(tmp_path: Path, exit_code: int) -> None:
    (tmp_path / "outcome.json").write_text(outcome(exit_code, 'rank 1 says "no", and $(date)'))
    ended = conclude(tmp_path)
    assert ended.returncode == exit_code
    assert f"this start ended with {exit_code}: rank 1 says" in ended.stdout and "$(date)" in ended.stdout
    assert ("requeued" in ended.stdout) == (exit_code == 75)
    assert (tmp_path / "reported").exists() == (exit_code not in (0, 75))


def test_a_reason_cannot_command_the_terminal_that_shows_the_log(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text(
        '{"exit_code": 3, "reason": "\x1b]0;owned\x07bad \rclip \u00e9", "time_s": 1}\n'
    )
    ended = conclude(tmp_path)
    assert ended.returncode == 3
    assert ended.stdout == "this start ended with 3: ]0;ownedbad clip \u00e9\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"exit_code": PATH[$(touch PROOF)], "reason": "x", "time_s": 1}',
        '{"exit_code": 75[$(touch PROOF)], "reason": "x", "time_s": 1}',
        '{"exit_code": , "reason": "x", "time_s": 1}',
        '{"exit_code": 0008, "reason": "x", "time_s": 1}',
        '{"exit_code": 7,\n"exit_code": PATH[$(touch PROOF)], "reason": "x", "time_s": 1}',
    ],
)
def test_an_outcome_that_no_start_wrote_counts_as_none(tmp_path: Path, text: str) -> None:
    proof = tmp_path / "proof"
    (tmp_path / "outcome.json").write_text(text.replace("PROOF", str(proof)))
    ended = conclude(tmp_path)
    assert not proof.exists()
    assert ended.returncode in (7, 75) and ended.stderr == ""


def test_three_starts_without_an_outcome_end_the_job(tmp_path: Path) -> None:
    earlier = outcome(75)
    (tmp_path / "outcome.json").write_text(earlier)
    assert [conclude(tmp_path, before=earlier.rstrip("\n")).returncode for _ in range(3)] == [75, 75, 5]


def test_signals_before_the_first_step_are_no_starts_in_vain(tmp_path: Path) -> None:
    ended = [conclude(tmp_path, srun_code=75, received="USR1") for _ in range(4)]
    assert [each.returncode for each in ended] == [75] * 4
    assert "this start ended with 75: SIGUSR1 came before the first step" in ended[0].stdout


SAY = """
source slurm/job.sh
eval "$(declare -f run_job | grep "trap '' PIPE")"
say on stdout
say on stderr >&2
srun_code=137 outcome_before= received= restarts=0 run_id=x folder=$1
source slurm/requeue.sh
slurm_ends_it() { false; }
write_report() { echo reported >"$folder/reported"; }
requeue() { exit 75; }
conclude
"""


@pytest.mark.parametrize("redirection", [">/dev/full 2>&1", "> >(exit 0) 2>&1"])
@pytest.mark.parametrize("folder", ["", "missing"])
def test_output_that_fails_does_not_end_the_batch_script(tmp_path: Path, redirection: str, folder: str) -> None:
    command = ["bash", "-c", f'bash -c "$@" {redirection}', "bash", SAY, "bash", str(tmp_path / folder)]
    assert subprocess.run(command, cwd=CHECKOUT, timeout=60, check=False).returncode == 75

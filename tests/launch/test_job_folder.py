"""slurm/job.sh and Python agree on the run folder and read config.yaml alike, to the letter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.worlds import CHECKOUT
from training.config.compose import compose
from training.config.for_shell import folder_of, main
from training.errors import ConfigError
from training.runs.run_folder import RunFolder

IDS = {
    "run_id=20240101_1200": "20240101_1200",
    "run_id=1e3": "1e3",
    "run_id=007": "007",
    "run_id=true": "true",
    "++run_id='quoted'": "quoted",
    '+run_id="lr=0.1, x"': "lr=0.1, x",
    "run_id=lr=0.1": "lr=0.1",
    "run_id=null": "77",
}


@pytest.mark.parametrize(("override", "run_id"), IDS.items())
def test_a_run_id_is_the_one_of_train_py(override: str, run_id: str) -> None:
    # wandb would refuse some of these names.
    overrides = ["experiment=smoke", "logger=disabled", "run_id=first", "outputs=1_000", override]
    assert folder_of(overrides, "77", restarted=False) == [run_id, str(CHECKOUT / "1_000" / run_id)]
    assert (compose(overrides).run_id or "77") == run_id


@pytest.mark.parametrize("run_id", ["", "a/b", "..", "-x", ".x", "a\nb", 129 * "x"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_run_id_that_is_no_folder_name_is_refused(run_id: str, restarted: bool) -> None:
    with pytest.raises(ConfigError, match=r"run_id must be a plain folder name.*Fix: run_id=NAME"):
        folder_of(["experiment=smoke", f"run_id={run_id}"], "77", restarted)


def test_a_restarted_job_finds_its_folder_although_the_checkout_has_changed() -> None:
    overrides = ["experiment=gone", "model.gone=1", "run_id=1_0", "++run_id=1_1", "outputs='/a b'"]
    assert folder_of(overrides, "77", restarted=True) == ["1_1", "/a b/1_1"]
    with pytest.raises(ConfigError, match="there is no key 'model.gone'"):
        folder_of(overrides, "77", restarted=False)


def test_the_experiments_own_outputs_count(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults: [smoke]\noutputs: /scratch/me\n")
    arguments = ["experiment=mine", "--config-dir", str(tmp_path)]
    assert folder_of(arguments, "77", restarted=False) == ["77", "/scratch/me/77"]


def test_errors_are_printed_once_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["folder", "77", "0", "experiment=smok"]) == 2
    assert main(["values", "data.root", "--", "experiment=smoke", "data.root=a\nb"]) == 2
    assert main(["values", "data.root", "--", "--multirun", "experiment=smoke"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.startswith("error (start-up): ") and "Fix: " in line for line in printed.err.splitlines()] == 3 * [
        True
    ]


def test_the_batch_script_takes_the_answers_as_they_are(tmp_path: Path) -> None:
    """Names, paths and YAML quoting that sed or an unquoted variable would change."""
    root, outputs = "  /data/it's: #1 ü $HOME ${x} [a]", f"{tmp_path}/out  put"
    run_id = "20240101_1200"
    RunFolder(Path(outputs) / run_id).write_config(
        compose(["experiment=smoke", f"data.root={root}", "distributed=horovod_gloo"])
    )
    script = """
        source slurm/job.sh
        name_folder "$@"
        read_config
        printf '%s\\n' "$run_id" "$folder" "$data_root" "$backend" "$controller"
    """
    environment = os.environ | {
        "TSM_PYTHON": sys.executable, "TSM_CONTAINER_IMAGE": "", "SLURM_JOB_ID": "77", "checkout": str(CHECKOUT),
    }  # fmt: skip
    overrides = ["experiment=smoke", f"outputs={outputs}", f"run_id={run_id}"]
    done = subprocess.run(
        ["bash", "-c", script, "bash", *overrides], cwd=CHECKOUT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    data_root = str(CHECKOUT / root)
    assert done.stdout.splitlines() == [run_id, f"{outputs}/{run_id}", data_root, "horovod", "gloo"]

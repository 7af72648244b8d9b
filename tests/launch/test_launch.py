"""Overrides that each launch script passes on, composed by Hydra."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.worlds import CHECKOUT
from tests.training.config.test_config import config_of
from training.config.schema import Config
from training.runs.run_folder import RunFolder

LAUNCH = CHECKOUT / "launch"

# script: experiment, autocast, device. Summit's V100 GPUs have no bfloat16.
SCRIPTS = {
    "kinetics_1536.sh": ("kinetics_1536", "float16", "cuda"),
    "kinetics_1536_lsf.sh": ("kinetics_1536", "float16", "auto"),
    "kinetics_384.sh": ("kinetics_384", "float16", "cuda"),
    "kinetics_single_node.sh": ("kinetics_single_node", "bfloat16", "cuda"),
    "something_v2_single_node.sh": ("something_v2", "bfloat16", "cuda"),
    "something_v2_64.sh": ("something_v2_64", "bfloat16", "cuda"),
    "smoke.sh": ("smoke", "off", "cpu"),
}
WITH_OVERRIDES = sorted(SCRIPTS.keys() - {"kinetics_1536_lsf.sh"})


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def overrides_of(script: str, folder: Path, *user: str) -> list[str]:
    """Overrides that the script passes to plan.py, recorded by stubs in a fake checkout."""
    given = folder / "given"
    (folder / "slurm").mkdir(parents=True)
    (folder / "slurm" / "job.sh").write_text(f"run_job() {{ printf '%s\\n' \"$@\" >{given}; }}\n")
    executable(folder / ".venv" / "bin" / "python", f"[[ $1 != plan.py ]] || printf '%s\\n' \"${{@:2}}\" >{given}")
    executable(folder / "bin" / "jsrun", "true")
    environment = os.environ | {
        "TSM_CHECKOUT": str(folder), "LS_SUBCWD": str(folder), "LSB_JOBID": "7", "USER": "user",
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run([LAUNCH / script, *user], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return given.read_text().splitlines()


def test_every_script_is_here() -> None:
    assert {path.name for path in LAUNCH.glob("*.sh")} == {*SCRIPTS, "local.sh"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_composes_with_the_precision_of_its_hardware(script: str, tmp_path: Path) -> None:
    config = config_of(*overrides_of(script, tmp_path))
    experiment, amp, device = SCRIPTS[script]
    assert (config.name, config.numerics.amp, config.distributed.device) == (experiment, amp, device)
    assert config.numerics.channels_last
    assert (config.numerics.dtype, config.evaluation.amp) == ("float32", "off")


@pytest.mark.parametrize("script", WITH_OVERRIDES)
def test_the_users_precision_wins(script: str, tmp_path: Path) -> None:
    def composed(name: str, *user: str) -> Config:
        return config_of(*overrides_of(script, tmp_path / name, *user))

    assert composed("reference", "numerics=reference").numerics.amp == "off"
    assert composed("gpu", "numerics=gpu", "seed=3").numerics.amp == "bfloat16"
    assert composed("key", "numerics.amp=off").numerics.amp == "off"


DECIDED_BY_THE_MACHINE = {"distributed", "numerics", "plan.write_config", "pipeline.workers", "run_id"}
"""Keys and groups that a launch script may set; all other keys belong to the recipe, in conf/experiment."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_holds_no_recipe(script: str, tmp_path: Path) -> None:
    experiment, *overrides = overrides_of(script, tmp_path)
    assert experiment == f"experiment={SCRIPTS[script][0]}"
    keys = {override.split("=")[0] for override in overrides}
    recipe = {key for key in keys if not {key, key.split(".")[0]} & DECIDED_BY_THE_MACHINE}
    assert recipe == set(), "Fix: move it to conf/experiment"


@pytest.mark.parametrize("script", WITH_OVERRIDES)
def test_the_first_check_of_a_script_plans_its_run(script: str, tmp_path: Path) -> None:
    (line,) = re.findall(
        r"^#   \.venv/bin/python plan\.py (\S.*?)(?:   .*)?$", (LAUNCH / script).read_text(), re.MULTILINE
    )
    planned, started = config_of(*line.split()), config_of(*overrides_of(script, tmp_path))
    for part in (
        "name",
        "model",
        "data",
        "pipeline",
        "batch",
        "optimizer",
        "schedule",
        "seed",
        "evaluation",
        "checkpoint",
    ):
        assert getattr(planned, part) == getattr(started, part), part


# --- launch/local.sh --------------------------------------------------------------------------------------------------


def local(folder: Path, nvidia_smi: str, *user: str) -> tuple[str, list[str]]:
    """Launcher that launch/local.sh starts, and its arguments of train.py, with `nvidia_smi` as the script of nvidia-smi."""
    bin_folder = folder / "bin"
    executable(bin_folder / "nvidia-smi", nvidia_smi)
    executable(bin_folder / "python", f'[[ $1 != -m ]] || exec {sys.executable} "$@"\nprintf \'%s\\n\' "$@"')
    executable(bin_folder / "horovodrun", "printf '%s\\n' horovodrun \"$@\"")
    environment = os.environ | {
        "TSM_PYTHON": str(bin_folder / "python"),
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
    }
    done = subprocess.run([LAUNCH / "local.sh", *user], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launcher, *arguments = done.stdout.splitlines()
    return launcher, arguments[arguments.index("train.py") + 1 :]


def gpus(*capabilities: str) -> str:
    """Script of an nvidia-smi on a machine with these GPUs."""
    lines = "\\n".join(capabilities)
    return f"case $1 in --list-gpus | --query-gpu=compute_cap) printf '{lines}\\n' ;; *) exit 2 ;; esac"


@pytest.mark.parametrize(
    ("nvidia_smi", "user", "amp"),
    [
        (gpus("9.0", "9.0"), [], "bfloat16"),
        (gpus("12.0", "8.9"), [], "bfloat16"),
        (gpus("8.0", "7.0"), [], "float16"),
        (gpus("7.5"), ["numerics=reference"], "off"),
        (gpus("9.0"), ["distributed.device=cpu"], "off"),
        ("echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2", [], "off"),
        ("echo 'No devices were found'; exit 6", [], "off"),
    ],
)
def test_the_precision_on_this_machine(nvidia_smi: str, user: list[str], amp: str, tmp_path: Path) -> None:
    launcher, overrides = local(tmp_path, nvidia_smi, "experiment=kinetics_single_node", *user)
    config = config_of(*overrides)
    assert launcher == "launch/local.py"
    assert (config.numerics.amp, config.numerics.channels_last) == (amp, amp != "off")


def test_a_run_that_is_composed_is_left_as_it_is(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").write_config(config_of("experiment=smoke", "distributed=horovod"))
    arguments = ["--run", str(tmp_path / "run")]
    assert local(tmp_path, gpus("9.0"), *arguments) == ("horovodrun", arguments)


@pytest.mark.parametrize(
    ("user", "launcher"),
    [
        (["++distributed='horovod'"], "horovodrun"),
        (["distributed=horovod", "distributed.backend=auto"], "launch/local.py"),
    ],
)
def test_the_launcher_of_a_backend(user: list[str], launcher: str, tmp_path: Path) -> None:
    assert local(tmp_path, "exit 6", "experiment=smoke", *user)[0] == launcher


def test_a_wrong_override_is_reported_before_processes_start(tmp_path: Path) -> None:
    environment = os.environ | {"TSM_PYTHON": sys.executable, "PROCESSES": "2"}
    done = subprocess.run([LAUNCH / "local.sh", "experiment=smok"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error (start-up): experiment=smok") and line.endswith("Fix: experiment=smoke")

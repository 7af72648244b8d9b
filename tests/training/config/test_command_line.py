"""The command line of the entry points: what they compose, what they refuse, and how errors are reported."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from training.config.command_line import Read, execute
from training.config.compose import compose
from training.config.keys import KEYS, REMOVED_KEYS, RENAMED_KEYS
from training.config.load import from_composed
from training.config.schema import Config
from training.errors import ConfigError
from training.runs.run_folder import RunFolder

CHECKOUT = Path(__file__).parents[3]


def started(program: str, *arguments: str, code: int = 0) -> list[Config]:
    """Configurations that `start` gets, if each start returns `code`."""
    configs = []

    def start(read: Read) -> int:
        configs.append(from_composed(read()))
        return code

    argv = list(sys.argv)
    try:
        assert execute(program, arguments, start) == code
    finally:
        sys.argv[:] = argv
    return configs


def refused(*overrides: str, base: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(("experiment=smoke", *overrides) if base is None else overrides, base)
    message = str(caught.value)
    assert "Fix: " in message.splitlines()[-1], message
    return message


# --- Unknown keys and options -----------------------------------------------------------------------------------------


def test_flags_of_a_program_are_overrides_that_others_replace() -> None:
    (config,) = started("plan", "experiment=smoke", "--sweep")
    assert (config.plan.sweep[0], config.plan.sweep[-1]) == (8, 4_096)
    (config,) = started("plan", "experiment=smoke", "--sweep", "plan.sweep=[4]")
    assert config.plan.sweep == [4]
    (config,) = started("evaluate", "experiment=smoke", "--explain")
    assert config.evaluation.explain == 12


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.shfit=none", "model.shift"),
        ("+model.shfit=none", "model.shift"),
        ("++model.shfit=none", "model.shift"),
        ("optimizer.lrr=3", "optimizer.lr;"),
        ("+optimizer.lrr=3", "optimizer.lr;"),
        ("optimiser.lr=3", "optimizer.lr;"),
        ("batch.global_batsch=8", "batch.global_batch"),
        ("lr=3", "optimizer.lr;"),
        ("epochs=3", "schedule.epochs"),
        ("sede=1", "seed"),
        ("modle=tsm_resnet50", "model"),
        ("+newgroup.x=1", "training/config/schema/"),
        ("model.shift.x=1", "Fix: model.shift=VALUE"),
        ("data.mirrored_words.0=[a,b]", "Fix: data.mirrored_words=VALUE"),
        ("data.mirrored_words[0]=[a,b]", "data.mirrored_words"),
        ("batch=8", "batch.global_batch"),
        ("batch={global_batsch:8}", "batch.global_batch"),
        ("model@data=tsm_resnet50", "model"),
        ("model.shift =none", "model.shift"),
        ("=3", "Fix"),
        ("~model.shift", "model.shift=VALUE"),
        ("~model", "model=VALUE"),
        ("~model.shfit", "leave it out"),
        ("smoke", "KEY=VALUE"),
        ("hydra.verbose=true", "leave it out"),
    ],
)
def test_an_override_of_no_known_key_is_refused(override: str, named: str) -> None:
    message = refused(override)
    assert override in message and named in message


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("experiment=smok", "Fix: experiment=smoke"),
        ("+experiment=smok", "Fix: experiment=smoke"),
        ("model=tsm_resnet51", "Fix: model=tsm_resnet50"),
        ("model='tsm_resnet51'", "Fix: model=tsm_resnet50"),
        ("model=schema", "Fix: model="),
        ("model=null", "Fix: model="),
        ("model=", "Fix: model="),
        ("model=[tsm_resnet50,tsm_resnet18]", "Fix: model="),
        ("model={shift:none}", "Fix: model="),
        ("evaluation=ten_crops", "Fix: evaluation=ten_crop"),
        ("distributed=horovod-gloo", "Fix: distributed=horovod_gloo"),
    ],
)
def test_an_unknown_option_of_a_group_is_refused(override: str, named: str) -> None:
    message = refused(override)
    assert override in message and named in message


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_known_key_may_have_hydras_signs(sign: str) -> None:
    config = compose([f"{sign}experiment=smoke", f"{sign}model.shift=none", f"{sign}run_id=here"])
    assert (config.name, config.model.shift, config.run_id) == ("smoke", "none", "here")


def test_the_last_of_two_values_counts() -> None:
    """Batch scripts append the user's overrides to their own."""
    assert compose(["experiment=smoke", "seed=1", "seed=2", "++seed=3"]).seed == 3


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_a_renamed_key_is_accepted_with_a_note(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    new, value = RENAMED_KEYS[old], "77.0" if old.endswith("_s") else "float16"
    group, name = new.split(".")
    assert str(getattr(getattr(compose(["experiment=smoke", f"{old}={value}"]), group), name)) == value
    assert capsys.readouterr().err == f"note: {old} is now called {new}\n"
    assert f"{old} is the old name of {new}" in refused(f"{new}={value}", f"+{old}={value}")


@pytest.mark.parametrize("old", REMOVED_KEYS)
def test_a_removed_key_of_an_old_run_is_ignored(old: str, tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").write_config(compose(["experiment=smoke", "seed=7"]))
    file = tmp_path / "run" / "config.yaml"
    group, name = old.split(".")
    file.write_text(file.read_text().replace(f"{group}:\n", f"{group}:\n  {name}: 0.437\n"))
    assert compose([], tmp_path / "run").seed == 7
    assert old in refused(f"{old}=1")


# --- Values of another type -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("schedule.epochs=abc", "must be a number. Fix: schedule.epochs=6"),
        ("schedule.epochs=", "must be a number. Fix: schedule.epochs=6"),
        ("schedule.epochs=null", "must be a number. Fix: schedule.epochs=6"),
        ("batch.global_batch=3.5", "must be a whole number. Fix: batch.global_batch=16"),
        ("batch.bn_group=few", "must be a whole number or null. Fix: batch.bn_group="),
        ("pipeline.workers=true", "must be a whole number. Fix: pipeline.workers=1"),
        ("model.temporal_pool=perhaps", "Fix: model.temporal_pool=true, or model.temporal_pool=false"),
        ("numerics.tf32=2", "Fix: numerics.tf32=true, or numerics.tf32=false"),
        ("pipeline.crop_scales=1", "must be a list, such as [a,b]. Fix: pipeline.crop_scales=[1.0,0.875,0.75]"),
        ("pipeline.crop_scales=[a]", "must be a list"),
        ("logger.tags=[a,1e3]", "Fix: quote it"),
        ("data.mirrored_words=[[left,2]]", "Fix: quote it"),
        ("data.mirrored_words=[left,right]", "a list of lists"),
        ("evaluation.ensemble=[a=b]", "cannot read this value"),
        ("seed=1,2", "several values are for --multirun"),
        ("seed=range(1,3)", "several values are for --multirun"),
        ("seed={a:1}", "must be a whole number"),
        ("name=null", "name needs a value. Fix: leave it out, or name='null'"),
        ("name=???", "missing value"),
    ],
)
def test_a_value_of_another_type_is_refused(override: str, words: str) -> None:
    message = refused(override)
    assert override in message and words in message


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {shfit: none}", ["experiment/mine", "model.shfit", "model.shift"]),
        ("newgroup: {x: 1}", ["experiment/mine", "newgroup"]),
        ("schedule: {epochs: abc}", ["experiment/mine", "schedule.epochs", "abc"]),
        ("model: {shift: [", ["mine.yaml"]),
        ("defaults: [{override /model: tsm_resnet51}]", ["tsm_resnet51"]),
        ("- 1", ["experiment/mine"]),
        ("run_id: 20240101_1200", ["mine.yaml: run_id is text", "202401011200", "Fix: quote it"]),
        ("pipeline: {flip: off}", ["mine.yaml: pipeline.flip is text", "False", "Fix: quote it"]),
    ],
)
def test_a_users_experiment_with_an_error_is_refused(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=mine"], extra=tmp_path)
    assert "Fix: " in str(caught.value).splitlines()[-1]
    for word in words:
        assert word in str(caught.value)


def test_a_users_experiment_composes(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults: [smoke]\nseed: 7\n")
    (config,) = started("train", "--config-dir", str(tmp_path), "experiment=mine", "max_steps=3")
    assert (config.name, config.seed, config.max_steps) == ("smoke", 7, 3)


def test_overrides_apply_to_a_run_folder(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run ${x}").write_config(compose(["experiment=smoke", "seed=7", "data.root=/a/${b}/c"]))
    folder = tmp_path / "run ${x}"
    config = compose(["evaluation=ten_crop", "evaluation.batch=3", "model.direction=past"], folder)
    assert (config.seed, config.data.root, config.model.direction) == (7, "/a/${b}/c", "past")
    assert (config.outputs, config.run_id) == (str(tmp_path), "run ${x}")
    assert (config.evaluation.crops, config.evaluation.batch) == (10, 3)
    for override in ("run_id=other", "outputs=/tmp", "experiment=smoke_tsn", "model.shfit=none"):
        assert override in refused(override, base=folder)


def test_training_resumes_a_run_and_not_one_of_its_checkpoints(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").write_config(compose(["experiment=smoke", "seed=7"]))
    (config,) = started("train", "--run", f"{tmp_path}/run/")
    assert (config.seed, config.outputs, config.run_id) == (7, str(tmp_path), "run")
    (tmp_path / "run" / "checkpoints" / "step-00000005").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"is a checkpoint.*Fix: --run {tmp_path}/run$"):
        started("train", "--run", f"{tmp_path}/run/checkpoints/step-00000005")


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["-m"], ["--multirun"]])
def test_a_sweep_starts_a_job_for_each_value(arguments: list[str]) -> None:
    swept = ["experiment=smoke", "seed=1,2", "data.root=007,'a,b',${x}", "distributed.hang_s=15"]
    configs = started("train", *swept, *arguments)
    roots = ["007", "a,b", "${x}"]
    assert [(config.seed, config.data.root) for config in configs] == [
        (seed, root) for seed in (1, 2) for root in roots
    ]
    assert {config.distributed.hang_timeout_s for config in configs} == {15.0}


def test_a_sweep_ends_with_a_job_that_fails() -> None:
    assert len(started("train", "-m", "experiment=smoke,smoke_tsn", code=3)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--multirun", "experiment=smoke,smok"], "Fix: experiment=smoke"),
        (["--multirun", "experiment=smoke", "model.shfit=a,b"], "model.shift"),
        (["--multirun", "experiment=smoke", "seed=1,two"], "seed"),
        (["--multirun", "experiment=smoke", "hydra/launcher=slurm"], "hydra/launcher"),
        (["--cfg", "job", "experiment=smok"], "Fix: experiment=smoke"),
        (["--cfg", "everything"], "--cfg"),
        (["--foo", "experiment=smoke"], "--foo"),
        (["--config-dir", "/nowhere", "experiment=smoke"], "/nowhere"),
        (["--run", "/nowhere", "seed=1"], "leave them out"),
        (["--run", "/nowhere", "-m"], "leave out"),
        (["--run", "/nowhere"], "--run /nowhere: there is no folder /nowhere"),
        (["--run"], "--run"),
    ],
)
def test_wrong_options_are_reported_by_start(arguments: Sequence[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        started("train", *arguments)
    assert "Fix: " in str(caught.value).splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan.py", "experiment=smoke", "+model.shfit=none"], "model.shift"),
        (["plan.py", "experiment=smok"], "smoke"),
        (["evaluate.py", "experiment=smoke", "optimizer.lrr=3"], "optimizer.lr;"),
    ],
)
def test_an_entry_point_reports_an_error_once_and_exits_with_2(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    ended = subprocess.run(
        [sys.executable, *arguments, f"outputs={tmp_path}"], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error (") and "Fix: " in line and words in line


def test_every_key_has_a_type() -> None:
    assert {"run_id", "model.shift", "data.mirrored_words"} <= KEYS.keys()

"""Hydra composes every experiment, and each check of a value names its key."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from training.config import checks
from training.config.checks import check
from training.config.compose import composed
from training.config.horovod_variables import check_horovod, horovod_variables
from training.config.keys import KEYS, RENAMED_KEYS, type_of
from training.config.load import from_composed, read_config
from training.config.overrides import CONF
from training.config.schema import Config, NumericsConfig
from training.errors import ConfigError
from training.runs.run_folder import RunFolder

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def compose(*overrides: str) -> Any:
    """Compose as `python train.py OVERRIDES` does."""
    return composed(overrides)


def config_of(*overrides: str) -> Config:
    return from_composed(compose(*overrides))


# --- Composition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment: str) -> None:
    # The user must give the file.
    first_weights = [] if compose(f"experiment={experiment}").model.init else ["model.init=FILE"]
    assert config_of(f"experiment={experiment}", *first_weights).name == experiment


@pytest.mark.parametrize(
    "choice",
    [f"{path.parent.name}={path.stem}" for path in sorted(CONF.glob("*/*.yaml")) if path.parent.name != "experiment"],
)
def test_every_choice_of_a_group_composes(choice: str) -> None:
    config_of("experiment=smoke", choice)


def test_the_command_line_wins_over_the_experiment() -> None:
    config = config_of("experiment=smoke", "batch.global_batch=32", "distributed=torch", "schedule.milestones=[1,2.5]")
    assert config.name == "smoke"
    assert config.batch.global_batch == 32
    assert config.distributed.backend == "torch"
    assert config.schedule.milestones == [1, 2.5]


def test_an_experiment_wins_over_its_groups() -> None:
    assert config_of("experiment=smoke_tsn").model.shift == "none"
    assert config_of("experiment=smoke").model.backbone == "resnet18"


@pytest.mark.parametrize(
    ("overrides", "amp", "channels_last"),
    [
        ([], "off", False),
        (["numerics=gpu"], "bfloat16", True),
        (["numerics=gpu_fp16"], "float16", True),
        (["numerics=gpu", "numerics=reference"], "off", False),
        (["numerics=gpu", "numerics.amp=float16"], "float16", True),
    ],
)
def test_numerics_are_chosen_by_name_and_the_last_name_counts(
    overrides: list[str], amp: str, channels_last: bool
) -> None:
    """Batch scripts rely on the last override, because they append the user's overrides to their own."""
    numerics = config_of("experiment=kinetics_single_node", *overrides).numerics
    assert (numerics.amp, numerics.channels_last) == (amp, channels_last)
    assert numerics == replace(NumericsConfig(), amp=amp, channels_last=channels_last)


@pytest.mark.parametrize("numerics", ["reference", "gpu"])
def test_an_experiments_own_memory_format_stays_under_any_numerics(numerics: str) -> None:
    assert config_of("experiment=smoke", f"numerics={numerics}").numerics.channels_last


def test_evaluation_is_never_lowered_with_training() -> None:
    """Published accuracies are in float32, so only evaluation.amp changes the precision of an evaluation."""
    for numerics in ("reference", "gpu", "gpu_fp16"):
        assert (
            config_of("experiment=kinetics_dense", f"numerics={numerics}", "evaluation=dense_30").evaluation.amp
            == "off"
        )


def test_an_unknown_key_in_a_file_is_refused() -> None:
    config = OmegaConf.create(OmegaConf.to_container(composed_once()))
    OmegaConf.update(config, "batch.global_batsch", 8, force_add=True)
    with pytest.raises(Exception, match="global_batsch"):
        from_composed(config)


@pytest.mark.parametrize("override", ["batch.global_batch=many", "model.dropout=half", "model.temporal_pool=perhaps"])
def test_a_value_of_the_wrong_type_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(override) + ".*Fix: " + re.escape(override.split("=")[0])):
        compose("experiment=smoke", override)


def test_missing_values_are_named() -> None:
    with pytest.raises(ConfigError, match=r"no value for batch\.global_batch.*Fix: .*experiment=smoke"):
        config_of()


def test_a_composed_configuration_survives_its_file(tmp_path: Path) -> None:
    config = config_of("experiment=smoke", "run_id=abc")
    OmegaConf.save(OmegaConf.structured(config), tmp_path / "config.yaml")
    assert from_composed(OmegaConf.load(tmp_path / "config.yaml")) == config


def test_a_run_folder_says_how_to_go_on(tmp_path: Path) -> None:
    """Ranks of a batch job read the config.yaml that the batch script composed, also after the folder was moved."""
    written = config_of("experiment=smoke", "run_id=there", "seed=17")
    RunFolder(tmp_path / "there").write_config(written)
    (tmp_path / "there").rename(tmp_path / "here")
    config = read_config(tmp_path / "here")
    assert (config.seed, config.run_id, config.outputs) == (17, "here", str(tmp_path))
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["config.yaml"]


RENAMED = {"distributed.wire": ("gradient_dtype", "float16"), "distributed.hang_s": ("hang_timeout_s", 77.0)}


def test_a_run_folder_with_renamed_keys_is_read(tmp_path: Path) -> None:
    """A config.yaml with the old key names yields the same configuration."""
    assert RENAMED.keys() == RENAMED_KEYS.keys()
    folder = tmp_path / "run"
    RunFolder(folder).write_config(config_of("experiment=smoke", "run_id=run"))
    container: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    for old, (new, value) in RENAMED.items():
        group, key = old.split(".")
        assert RENAMED_KEYS[old] == f"{group}.{new}"
        del container[group][new]
        container[group][key] = value
    OmegaConf.save(OmegaConf.create(container), folder / "config.yaml")
    config = read_config(folder)
    assert (config.distributed.gradient_dtype, config.distributed.hang_timeout_s) == ("float16", 77.0)


@pytest.mark.parametrize("text", [None, "seed: [1", "seed: seventeen", "sede: 17", "[]", "name: 1_0"])
def test_a_folder_without_a_configuration_is_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"(?s)config.yaml.*Fix: "):
        read_config(tmp_path)


def test_an_older_config_has_the_micro_batch_as_a_number(tmp_path: Path) -> None:
    """The key has become text, for the sake of auto."""
    folder = RunFolder(tmp_path)
    folder.write_config(with_value("batch.micro_batch", "8"))
    text = folder.config.read_text()
    folder.config.write_text(text.replace("micro_batch: '8'", "micro_batch: 8"))
    assert folder.config.read_text() != text
    assert read_config(tmp_path).batch.micro_batch_limit == 8


# --- Values -----------------------------------------------------------------------------------------------------------

BAD_VALUES: list[tuple[str, Any]] = [
    ("model.backbone", "vgg"),
    ("model.modality", "depth"),
    ("model.init", ""),
    ("model.init_sha256", "abc"),
    ("model.shift", "inplace"),
    ("model.direction", "future"),
    ("model.num_frames", 0),
    ("model.fold_div", 1),
    ("model.dropout", 1.0),
    ("model.dropout", -0.1),
    ("data.num_classes", 0),
    ("data.max_bad_clips", -1),
    ("data.retry_s", -1.0),
    ("data.frame_rate", 0.0),
    ("pipeline.workers", -1),
    ("pipeline.prefetch", 0),
    ("pipeline.size", 0),
    ("pipeline.crop_scales", []),
    ("pipeline.crop_scales", [1.0, 0.0]),
    ("pipeline.crop_scales", [1.1]),
    ("pipeline.loader", "decord"),
    ("pipeline.decoder", "decord"),
    ("pipeline.dali_threads", 0),
    ("pipeline.sampling", "random"),
    ("pipeline.burn_in", -1),
    ("pipeline.distances", []),
    ("pipeline.distances", [2, 0]),
    ("pipeline.loss_from", 0),
    ("pipeline.flip", "sometimes"),
    ("data.mirrored_words", [["left"]]),
    ("data.mirrored_words", [["left", "Left"]]),
    ("data.mirrored_words", [["left", ""]]),
    ("data.mirrored_words", [["left", "right"], ["Right", "wrong"]]),
    ("batch.precise_bn_steps", -1),
    ("batch.global_batch", 0),
    ("optimizer.name", "adam"),
    ("optimizer.scaling", "cubic"),
    ("optimizer.lr", 0.0),
    ("optimizer.lr", float("nan")),
    ("numerics.max_bad_steps_in_a_row", 0),
    ("optimizer.base_batch", 0),
    ("optimizer.weight_decay", -1e-4),
    ("optimizer.bias_lr_multiplier", 0.0),
    ("optimizer.classifier_lr_multiplier", 0.0),
    ("optimizer.first_conv_lr_multiplier", 0.0),
    ("optimizer.trust_coefficient", 0.0),
    ("optimizer.eps", -1.0),
    ("optimizer.momentum", 1.0),
    ("optimizer.beta2", 1.0),
    ("optimizer.label_smoothing", 1.0),
    ("optimizer.ema_decay", 1.0),
    ("schedule.decay", "linear"),
    ("schedule.epochs", float("inf")),
    ("schedule.milestones", [1.0, float("nan")]),
    ("schedule.milestones", [-1.0]),
    ("schedule.warmup_start", -0.1),
    ("schedule.factor", -0.1),
    ("schedule.end", float("nan")),
    ("schedule.epochs", 0.0),
    ("schedule.warmup_epochs", -1.0),
    ("schedule.warmup_epochs", 1e4),
    ("numerics.dtype", "float16"),
    ("numerics.amp", "float32"),
    ("evaluation.amp", "float32"),
    ("distributed.backend", "mpi"),
    ("distributed.controller", "ssh"),
    ("distributed.device", "tpu"),
    ("distributed.gradient_dtype", "int8"),
    ("distributed.timeout_s", 0.0),
    ("distributed.timeout_s", float("inf")),
    ("distributed.hang_timeout_s", 0.0),
    ("distributed.world_size", 0),
    ("logger.wandb", "sometimes"),
    ("logger.tags", [""]),
    ("logger.tags", ["a", "b" * 65]),
    ("logger.project", ""),
    ("logger.project", "team/tsm"),
    ("logger.project", "a#b"),
    ("logger.project", "x" * 129),
    ("logger.group", " study"),
    ("logger.group", "x" * 129),
    ("logger.every_steps", 0),
    ("checkpoint.every_epochs", 0),
    ("checkpoint.every_steps", 0),
    ("checkpoint.every_minutes", 0.0),
    ("checkpoint.keep", 0),
    ("checkpoint.last_retry_s", -1.0),
    ("evaluation.checkpoint", "last"),
    ("evaluation.every_epochs", 0),
    ("evaluation.batch", 0),
    ("evaluation.clips", "thrice"),
    ("evaluation.crops", 4),
    ("evaluation.split", "train"),
    ("evaluation.ensemble_average", "mean"),
    ("evaluation.explain", -1),
    ("evaluation.distances", []),
    ("evaluation.distances", [1, 0]),
    ("evaluation.distances", [2, 2]),
    ("evaluation.beside", ["outputs/other"]),
    ("plan.experience", 0.0),
    ("plan.sweep", [8, 0]),
    ("cluster.price_per_gpu_h", -1.0),
    ("distributed.horovod_cycle_ms", 0.0),
    ("distributed.horovod_fusion_mib", -1.0),
    ("distributed.horovod_cache", -1),
    ("logger.profile_steps", [5]),
    ("logger.profile_steps", [5, 4]),
]


@cache
def composed_once() -> Any:
    return compose("experiment=smoke")


def smoke() -> Config:
    return from_composed(composed_once())


def with_value(key: str, value: Any) -> Config:
    config = smoke()
    group, name = key.split(".")
    assert hasattr(getattr(config, group), name)
    setattr(getattr(config, group), name, value)
    return config


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_a_bad_value_is_named_by_its_key_with_a_fix(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)) as caught:
        check(with_value(key, value))
    assert str(value) in str(caught.value)
    assert "Fix: " in str(caught.value).splitlines()[-1]


@pytest.mark.parametrize("key", [key for key, choices in checks._CHOICES.items() if isinstance(choices[0], str)])
def test_a_misspelt_choice_is_refused_with_the_nearest(key: str) -> None:
    for choice in map(str, checks._CHOICES[key]):
        for typo in (choice + choice[-1], f"x{choice}", choice.upper()):
            with pytest.raises(ConfigError, match=rf"{re.escape(key)} must be .* Fix: {re.escape(key)}={choice}$"):
                check(with_value(key, typo))


FREE_TEXT = {
    "model.init", "model.init_sha256", "data.name", "data.root", "data.train", "data.val", "data.test", "data.prepare",
    "logger.project", "logger.group", "evaluation.checkpoint", "batch.micro_batch", "plan.json", "plan.plot", "plan.html",
    "plan.calibrate", "cluster.name", "checkpoint.second_place", "name", "outputs", "run_id", "distributed.horovod_timeline",
}  # fmt: skip


def test_every_text_key_has_a_closed_set_of_values_or_is_free() -> None:
    assert {key for key in KEYS if type_of(key) is str} - checks._CHOICES.keys() == FREE_TEXT


def test_every_check_has_a_bad_value_above() -> None:
    checked = {*checks._CHOICES, *checks._POSITIVE, *checks._NOT_NEGATIVE, *checks._NULLABLE_NOT_NEGATIVE}
    assert checked <= {key for key, _ in BAD_VALUES}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.dropout", 0.0),
        ("pipeline.workers", 0),
        ("optimizer.weight_decay", 0.0),
    ],
)
def test_values_at_the_edge_are_taken(key: str, value: Any) -> None:
    check(with_value(key, value))


def test_a_run_of_nothing_but_warm_up_is_taken() -> None:
    check(with_value("schedule.warmup_epochs", smoke().schedule.epochs))


@pytest.mark.parametrize(("key", "value"), [("evaluation.crops", 3), ("evaluation.save_logits", True)])
def test_a_stream_has_one_view_and_no_logits_of_clips(key: str, value: Any) -> None:
    config = with_value(key, value)
    config.evaluation.beside = []
    check(config)
    config.evaluation.clips = "stream"
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}.*evaluation=stream|evaluation=stream.*{re.escape(key)}"):
        check(config)


@pytest.mark.parametrize("backend", ["torch", "single"])
@pytest.mark.parametrize(
    ("key", "value"), [("horovod_cycle_ms", 2.5), ("horovod_hierarchical", False), ("horovod_timeline", "t.json")]
)
def test_a_setting_of_horovod_is_refused_on_another_backend(backend: str, key: str, value: Any) -> None:
    config = with_value(f"distributed.{key}", value)
    check(config)
    with pytest.raises(
        ConfigError, match=rf"distributed\.{key}={value} .* backend is {backend}\. Fix: distributed\.{key}=null"
    ):
        check_horovod(config.distributed, backend)
    config.distributed.backend = backend
    with pytest.raises(ConfigError, match=rf"distributed\.{key}"):
        check(config)


def test_settings_of_horovod_become_its_variables() -> None:
    overrides = (
        "horovod_cycle_ms=2.5 horovod_fusion_mib=64 horovod_cache=0 horovod_hierarchical=true horovod_timeline=t.json"
    )
    config = config_of("experiment=smoke", *(f"distributed.{override}" for override in overrides.split()))
    assert horovod_variables(config.distributed) == {
        "HOROVOD_CYCLE_TIME": "2.5",
        "HOROVOD_FUSION_THRESHOLD": str(64 << 20),
        "HOROVOD_CACHE_CAPACITY": "0",
        "HOROVOD_HIERARCHICAL_ALLREDUCE": "1",
        "HOROVOD_TIMELINE": "t.json",
    }
    assert horovod_variables(smoke().distributed) == {}


@pytest.mark.parametrize("key", ["numerics.amp", "evaluation.amp"])
def test_float64_with_lower_precision_is_refused(key: str) -> None:
    config = with_value(key, "bfloat16")
    config.numerics.dtype = "float64"
    with pytest.raises(ConfigError, match=rf"{key}=bfloat16.*numerics\.dtype=float64.*Fix: {key}=off"):
        check(config)


@pytest.mark.parametrize("run_id", ["a:b", "50%", "a'b"])
def test_a_run_id_that_wandb_refuses_is_refused_where_wandb_logs(run_id: str) -> None:
    config = smoke()
    config.run_id = run_id
    with pytest.raises(ConfigError, match=r"run_id=.*Fix: another run_id, or logger\.wandb=disabled"):
        check(config)
    config.logger.wandb = "disabled"
    check(config)


NO_FOLDERS = [
    "../other", "a/b", "/tmp/run", "..", ".", "", "-x", ".hidden", "~", " a", "a ", "a\nb", "a\tb", "a\x1b[0m", "null", "'a'",
    "a\\b", 129 * "x", 100 * "\u00fc" + "\u00fc",
]  # fmt: skip


@pytest.mark.parametrize("run_id", NO_FOLDERS)
def test_a_run_id_that_is_no_folder_name_is_refused(run_id: str) -> None:
    config = smoke()
    config.run_id = run_id
    with pytest.raises(ConfigError, match="run_id must be a plain folder name.*Fix: run_id=NAME"):
        check(config)
    config.run_id, config.name = None, run_id
    with pytest.raises(ConfigError, match="name must be part of a folder name"):
        check(config)


@pytest.mark.parametrize(
    "run_id", ["20240101_1200", "007", "1e3", "true", "lr=0.1,x", "L\u00e4ufe 3", "a'b", "a#b$c{d}", 128 * "x"]
)
def test_a_folder_name_is_accepted(run_id: str) -> None:
    config = smoke()
    config.run_id, config.logger.wandb = run_id, "disabled"
    check(config)


def test_a_seed_fits_into_64_bits() -> None:
    with pytest.raises(ConfigError, match="seed must fit into 64 bits"):
        config_of("experiment=smoke", f"seed={2**63}")


def test_every_field_has_a_default_or_is_asked_for() -> None:
    """Keys without a default are exactly those that the message on missing values names."""
    missing = OmegaConf.missing_keys(OmegaConf.structured(Config))
    assert missing == {
        "data.name", "data.root", "data.num_classes", "batch.global_batch", "optimizer.lr", "optimizer.base_batch",
        "schedule.epochs",
    }  # fmt: skip


def test_zero_gammas_are_for_random_weights() -> None:
    with pytest.raises(ConfigError, match=r"model\.zero_init_gamma=true.*model\.init=imagenet.*Fix"):
        config_of("experiment=smoke", "model.zero_init_gamma=true", "model.init=imagenet")

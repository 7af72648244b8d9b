"""The rule that compares an evaluation's configuration with the run's: refused, stated or free, by the kind of each key."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.training.config.test_config import config_of, smoke
from training.build.recipe import recipe_of
from training.config.schema import Config
from training.errors import ConfigError
from training.evaluation.run_config import (
    KINDS,
    Kind,
    differences,
    differing_clips,
    differing_from_checkpoint,
    differing_views,
    flat,
    settings_of,
)


def changed(key: str, value: Any) -> Config:
    config = deepcopy(smoke())
    *groups, name = key.split(".")
    owner = getattr(config, groups[0]) if groups else config
    assert getattr(owner, name) != value
    setattr(owner, name, value)
    return config


def recipe() -> dict[str, Any]:
    """The recipe of a smoke run as its checkpoints hold it."""
    return recipe_of(smoke(), 40, "digest").as_dict()


def test_every_key_of_the_schema_has_a_kind() -> None:
    """A new key must be given a kind in training/evaluation/run_config.py."""
    assert set(flat(smoke())) == set(KINDS)


def test_no_key_has_two_kinds() -> None:
    from training.evaluation.run_config import _KEYS

    keys = [key for keys in _KEYS.values() for key in keys.split()]
    assert sorted(keys) == sorted(KINDS)


def test_every_key_of_a_recipes_model_is_known_by_the_rule() -> None:
    known = settings_of(recipe())
    assert {key for key in known if KINDS[key] is Kind.IDENTITY} == {
        key for key, kind in KINDS.items() if kind is Kind.IDENTITY and key != "data.num_classes"
    }
    assert (
        known["pipeline.size"] == 32
        and known["pipeline.sampling"] == "uniform"
        and known["numerics.dtype"] == "float32"
    )


def test_the_runs_own_configuration_differs_in_nothing() -> None:
    assert differing_views("run", settings_of(recipe(), smoke()), deepcopy(smoke())) == []
    assert differences(flat(smoke()), smoke(), *Kind) == []


IDENTITIES = [
    ("model.backbone", "resnet34"),
    ("model.modality", "flow"),
    ("model.shift", "none"),
    ("model.direction", "past"),
    ("model.fold_div", 4),
    ("model.temporal_pool", True),
    ("model.non_local", True),
    ("data.num_classes", 4),
    ("optimizer.ema_decay", 0.9),
]

VIEWS = [
    ("pipeline.size", 64, "pipeline.size=64 (trained: 32)"),
    ("pipeline.sampling", "dense", "pipeline.sampling=dense (trained: uniform)"),
    ("model.num_frames", 16, "model.num_frames=16 (trained: 8)"),
    ("data.val", "test.arrow", "data.val=test.arrow (trained: val.arrow)"),
    ("evaluation.full_resolution", True, "evaluation.full_resolution=true (trained: false)"),
    ("evaluation.crops", 10, "evaluation.crops=10 (trained: 1)"),
    ("evaluation.amp", "bfloat16", "evaluation.amp=bfloat16 (trained: off)"),
    ("numerics.channels_last", False, "numerics.channels_last=false (trained: true)"),
]


@pytest.mark.parametrize(("key", "value"), IDENTITIES)
def test_another_meaning_of_the_weights_is_refused(key: str, value: Any) -> None:
    trained = settings_of(recipe(), smoke())
    with pytest.raises(ConfigError, match=rf"run was trained with {key}=.*, not .*\. Fix: {key}=") as caught:
        differing_views("run", trained, changed(key, value))
    assert "--run" in str(caught.value)


def test_all_refused_keys_are_named_at_once() -> None:
    config = changed("model.shift", "none")
    config.model.fold_div = 4
    with pytest.raises(ConfigError, match=r"Fix: model\.shift=residual model\.fold_div=8;"):
        differing_views("run", settings_of(recipe(), smoke()), config)


@pytest.mark.parametrize(("key", "value", "told"), VIEWS)
def test_another_view_is_stated(key: str, value: Any, told: str) -> None:
    assert [str(each) for each in differing_views("run", settings_of(recipe(), smoke()), changed(key, value))] == [told]


def test_identities_above_are_all_of_them() -> None:
    assert [key for key, _ in IDENTITIES] == [key for key, kind in KINDS.items() if kind is Kind.IDENTITY]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.root", "/elsewhere"),
        ("pipeline.workers", 7),
        ("evaluation.batch", 1),
        ("schedule.epochs", 9.0),
        ("seed", 3),
    ],
)
def test_what_changes_no_score_is_not_stated(key: str, value: Any) -> None:
    assert differing_views("run", settings_of(recipe(), smoke()), changed(key, value)) == []


def test_the_recipe_counts_where_the_runs_configuration_was_changed_later() -> None:
    assert settings_of(recipe(), changed("pipeline.size", 64))["pipeline.size"] == 32


def test_a_recipe_without_later_keys_is_compared_in_the_others() -> None:
    old = recipe()
    del old["model"]["temporal_pool"], old["optimizer"]["ema_decay"], old["numerics"]
    config = changed("model.temporal_pool", True)
    assert differing_views("run", settings_of(old), config) == []
    with pytest.raises(ConfigError, match=r"trained with model\.temporal_pool=false, not true"):
        differing_views("run", settings_of(old, smoke()), config)


@pytest.mark.parametrize("file", [".", "network.safetensors"])
def test_weights_of_a_checkpoint_are_compared_with_its_recipe(tmp_path: Path, file: str) -> None:
    """Weights named by model.init, without the run: no EMA is evaluated, which is stated."""
    (tmp_path / "state.json").write_text(json.dumps({"recipe": recipe() | {"optimizer": {"ema_decay": 0.9}}}))
    (tmp_path / "network.safetensors").touch()
    told = [str(each) for each in differing_from_checkpoint(tmp_path / file, changed("pipeline.size", 64))]
    assert told == ["pipeline.size=64 (trained: 32)", "optimizer.ema_decay=null (trained: 0.9)"]
    with pytest.raises(ConfigError, match=r"trained with model\.shift=residual, not none"):
        differing_from_checkpoint(tmp_path / file, changed("model.shift", "none"))


@pytest.mark.parametrize("state", [None, "", "{}", "[]", "[1"])
def test_weights_from_elsewhere_are_not_compared(tmp_path: Path, state: str | None) -> None:
    if state is not None:
        (tmp_path / "state.json").write_text(state)
    assert differing_from_checkpoint(tmp_path / "tsm.pth", changed("model.shift", "none")) == []


def test_other_clips_than_those_of_the_runs_last_evaluation_are_stated(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert differing_clips(metrics, "1234567890abcdef") == []
    records: list[dict[str, Any]] = [{"kind": "evaluation"}, {"kind": "train"}]
    for digest in (None, "1234567890ab", "ba0987654321"):
        records += [] if digest is None else [{"kind": "evaluation", "manifest": digest}]
        metrics.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        told = [str(each) for each in differing_clips(metrics, "1234567890abcdef")]
        other = ["validation manifest=1234567890ab (trained: ba0987654321)"]
        assert told == (other if digest == "ba0987654321" else [])


def test_groups_of_a_protocol_are_stated_key_by_key() -> None:
    told = differing_views("run", flat(smoke()), config_of("experiment=smoke", "evaluation=ten_crop"))
    assert [each.key for each in told] == ["evaluation.clips", "evaluation.crops"]

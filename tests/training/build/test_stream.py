"""Training for a live stream: what it is refused to, and what it adds to the recipe and the plan."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from tests.training.config.test_config import compose
from training.build.data import augmentation_of, protocol_of
from training.build.recipe import recipe_of
from training.build.stream import stream_sampling_of
from training.config.checks import check
from training.config.load import from_composed
from training.config.schema import Config
from training.errors import ConfigError
from training.planning.memory import step_costs
from training.planning.summary import describe_recipe
from training.recipe import Recipe, make_execution


@cache
def composed_once() -> Any:
    return compose("experiment=smoke_online")


def online(**changes: Any) -> Config:
    """Return smoke_online's configuration with other values of keys, whose dots are written as underscores: model__shift."""
    config = from_composed(composed_once())
    for key, value in changes.items():
        group, name = key.split("__")
        assert hasattr(getattr(config, group), name)
        setattr(getattr(config, group), name, value)
    return config


def recipe(config: Config) -> Recipe:
    return recipe_of(config, 960, "digest", "random")


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"model__direction": "both"}, "model.direction=past"),
        ({"model__temporal_pool": True}, "model.temporal_pool=false"),
        ({"model__backbone": "resnet50", "model__non_local": True}, "model.non_local=false"),
        ({"pipeline__loader": "dali"}, "pipeline.loader=torch"),
    ],
)
def test_what_cannot_be_trained_for_a_stream_is_refused(changes: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigError, match=f"pipeline.sampling=stream.*Fix: {fix}"):
        recipe(online(**changes))
    recipe(online(**changes, pipeline__sampling="uniform"))


def test_a_network_without_a_shift_can() -> None:
    recipe(online(model__shift="none", model__direction="both"))


def test_loss_from_a_frame_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.loss_from=9.*Fix: pipeline\.loss_from=8 or less"):
        check(online(pipeline__loss_from=9))
    with pytest.raises(ConfigError, match=r"pipeline\.loss_from=3 leaves no frame.*Fix: pipeline\.score_burn_in=false"):
        check(online(pipeline__burn_in=2))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pipeline__burn_in", 4),
        ("pipeline__distances", [2, 3, 4, 5]),
        ("pipeline__loss_from", 1),
        ("pipeline__score_burn_in", False),
        ("pipeline__sampling", "uniform"),
    ],
)
def test_each_setting_is_in_the_recipe(key: str, value: Any) -> None:
    assert recipe(online(**{key: value})).fingerprint != recipe(online()).fingerprint


def test_the_recipe_of_other_samplings_has_no_new_key() -> None:
    """Checkpoints of older versions lack it, and a complete run is recognized by its fingerprint."""
    assert "stream" not in recipe(online(pipeline__sampling="uniform")).augmentation
    assert "stream" in recipe(online()).augmentation


def test_an_evaluation_is_that_of_uniform_sampling() -> None:
    config = online()
    uniform = replace(config.pipeline, sampling="uniform")
    assert protocol_of(config.model, config.pipeline, config.evaluation) == protocol_of(
        config.model, uniform, config.evaluation
    )


def test_the_plan_counts_the_frames_of_the_burn_in() -> None:
    config = online()
    augmentation = augmentation_of(config.model, config.data, config.pipeline)
    assert augmentation.sample_frames == 16
    assert "batch norm groups of 16 clips (256 frames)" in describe_recipe(recipe(config))
    network = config.model, config.data.num_classes, config.pipeline.size
    execution = make_execution(2, 2, 1)
    alone, after_burn_in = (
        step_costs(*network, config.numerics, config.optimizer, execution, stream).peak_bytes
        for stream in (None, stream_sampling_of(config.pipeline))
    )
    # Activations of twice the frames.
    assert after_burn_in > alone * 1.02

"""Evaluation protocols of conf/evaluation, and the part of the configuration that determines training."""

from dataclasses import replace
from typing import Any

import pytest

from pipelines.prepare.shapes.drawing import CLASSES
from pipelines.stream.augmentation import Augmentation
from pipelines.stream.eval_views import EvalProtocol
from pipelines.stream.frame_sampling import EVALUATION_RULES
from pipelines.stream.mirror_labels import mirrored_labels
from training.build.data import augmentation_of, protocol_of
from training.build.recipe import recipe_of
from training.config.checks import check
from training.config.schema import Config
from training.errors import ConfigError

from .test_config import config_of, smoke


def protocol_in(config: Config) -> EvalProtocol:
    return protocol_of(config.model, config.pipeline, config.evaluation)


def augmentation_in(config: Config) -> Augmentation:
    return augmentation_of(config.model, config.data, config.pipeline)


PROTOCOLS = {
    "validation": EvalProtocol(8, 32, "uniform_validation"),
    "centre": EvalProtocol(8, 32, "uniform"),
    "two_clips_full": EvalProtocol(8, 32, "twice", 3, full_resolution=True, portrait_bug=True),
    "dense_30": EvalProtocol(8, 32, "dense", 3, full_resolution=True, portrait_bug=True),
    "ten_crop": EvalProtocol(8, 32, "uniform", 10),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_protocols_of_the_configuration(name: str) -> None:
    assert protocol_in(config_of("experiment=smoke", f"evaluation={name}")) == PROTOCOLS[name]


def test_the_stream_takes_whole_clips() -> None:
    config = config_of("experiment=smoke", "evaluation=stream")
    assert protocol_in(config) == EvalProtocol(8, 32, "stream")
    assert recipe_of(config, 960, "digest") == recipe_of(smoke(), 960, "digest")


def test_a_run_validates_as_it_samples() -> None:
    assert protocol_in(smoke()) == PROTOCOLS["validation"]
    dense = config_of("experiment=smoke", "pipeline.sampling=dense")
    assert protocol_in(dense) == EvalProtocol(8, 32, "dense_validation")
    assert all(protocol_in(config).clips in EVALUATION_RULES for config in (smoke(), dense))


def test_flow_is_sampled_and_evaluated_as_flow() -> None:
    """Give the modality to samples and views. The recipe has it among the network's settings, and only for flow."""
    config = config_of("experiment=smoke", "model.modality=flow", "evaluation=ten_crop")
    assert protocol_in(config) == replace(PROTOCOLS["ten_crop"], modality="flow")
    assert augmentation_in(config) == replace(augmentation_in(smoke()), modality="flow")
    flow, rgb = (recipe_of(each, 960, "digest") for each in (config, smoke()))
    assert flow.augmentation == rgb.augmentation and "modality" not in rgb.augmentation
    assert (flow.model["modality"], rgb.model.get("modality", "rgb")) == ("flow", "rgb")


def test_an_experiment_keeps_its_batch_under_another_protocol() -> None:
    config = config_of("experiment=smoke", "evaluation=dense_30")
    assert (config.evaluation.batch, config.evaluation.every_epochs) == (24, 2)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_protocol_is_no_part_of_the_recipe(name: str) -> None:
    """Evaluate a run with any protocol, not only with the one of its training."""
    other = config_of("experiment=smoke", f"evaluation={name}", "evaluation.batch=3", "evaluation.save_logits=true")
    assert recipe_of(other, 960, "digest") == recipe_of(smoke(), 960, "digest")


@pytest.mark.parametrize(
    "override",
    [
        "pipeline.sampling=dense",
        "pipeline.flip=relabel",
        "pipeline.size=64",
        "pipeline.crop_scales=[1.0]",
        "model.num_frames=4",
    ],
)
def test_what_training_does_to_clips_is_a_part_of_the_recipe(override: str) -> None:
    assert recipe_of(config_of("experiment=smoke", override), 960, "") != recipe_of(smoke(), 960, "")


def test_words_count_where_labels_are_exchanged() -> None:
    words = "data.mirrored_words=[[Left,right]]"
    assert augmentation_in(config_of("experiment=smoke", words)) == augmentation_in(smoke())
    relabel = augmentation_in(config_of("experiment=smoke", words, "pipeline.flip=relabel"))
    assert (relabel.flip, relabel.mirrored_words) == ("relabel", (("left", "right"),))


def test_shapes_can_be_mirrored() -> None:
    """Mirroring swaps right with left and clockwise with counter-clockwise; all other classes keep their label."""
    assert mirrored_labels(CLASSES, smoke().data.mirrored_words) == [1, 0, 2, 3, 4, 5, 7, 6, 8, 9]


def changed(**values: Any) -> Config:
    config = smoke()
    for key, value in values.items():
        group, name = key.split("__")
        assert hasattr(getattr(config, group), name)
        setattr(getattr(config, group), name, value)
    return config


def test_relabelling_needs_words() -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.flip=relabel needs .*data\.mirrored_words=\[\[left,right\]\]"):
        check(changed(pipeline__flip="relabel", data__mirrored_words=[]))
    check(changed(pipeline__flip="relabel", data__mirrored_words=[["left", "right"]]))


def test_a_flip_that_gives_wrong_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.flip=on would give .*data\.mirrored_words.*Fix: pipeline\.flip="):
        check(changed(pipeline__flip="on", data__mirrored_words=[["left", "right"]]))
    check(changed(pipeline__flip="off", data__mirrored_words=[["left", "right"]]))
    check(changed(pipeline__flip="on", data__mirrored_words=[]))


@pytest.mark.parametrize("key", ["pipeline__sampling", "evaluation__clips"])
def test_a_dense_window_holds_64_frames(key: str) -> None:
    check(changed(model__num_frames=64, **{key: "dense"}))
    with pytest.raises(ConfigError, match=rf"{key.replace('__', '.')}=dense .*model\.num_frames=65"):
        check(changed(model__num_frames=65, **{key: "dense"}))

"""Experiments that reproduce published runs, compared with the published settings key by key."""

import re
from dataclasses import replace
from typing import Any

import pytest

from training.build.data import augmentation_of
from training.build.recipe import recipe_of
from training.config.load import from_composed
from training.config.schema import Config
from training.errors import ConfigError
from training.recipe import Recipe, make_execution

from .test_config import compose, config_of

# Training clips of the published 1,536-GPU run (reference: arXiv:1910.00932).
KINETICS_CLIPS = 239_781
SOMETHING_V1_CLIPS = 86_017
SOMETHING_V2_CLIPS = 168_913
# Split 1.
UCF101_CLIPS = 9_537

# Overrides that each experiment leaves to the user.
TOLD = {"ucf101_finetune": ["model.init=kinetics.pth"], "hmdb51_finetune": ["model.init=kinetics.pth"]}


def experiment(name: str, *overrides: str) -> Config:
    return config_of(f"experiment={name}", *TOLD.get(name, []), *overrides)


def recipe(config: Config, clips: int) -> Recipe:
    return recipe_of(config, clips, "digest")


# experiment: classes, clips per step, rate, weight decay, epochs, milestones, dropout, sampling, flip, partial batch
# norm
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "kinetics_single_node": (400, 128, 0.02, 1e-4, 50, [20, 40], 0.5, "uniform", "on", False),
    "kinetics_dense": (400, 128, 0.02, 1e-4, 100, [40, 80], 0.5, "dense", "on", False),
    "something_v1": (174, 64, 0.01, 5e-4, 50, [20, 40], 0.5, "uniform", "off", False),
    "something_v2": (174, 64, 0.01, 5e-4, 50, [20, 40], 0.5, "uniform", "off", False),
    "jester": (27, 64, 0.01, 5e-4, 50, [20, 40], 0.5, "uniform", "off", False),
    "ucf101_finetune": (101, 64, 0.001, 5e-4, 25, [10, 20], 0.8, "uniform", "on", True),
    "hmdb51_finetune": (51, 64, 0.001, 5e-4, 25, [10, 20], 0.8, "uniform", "on", True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_settings_are_the_published_ones(name: str) -> None:
    config = experiment(name)
    model, optimizer, schedule = config.model, config.optimizer, config.schedule
    assert (
        config.data.num_classes, config.batch.global_batch, optimizer.lr, optimizer.weight_decay, schedule.epochs,
        schedule.milestones, model.dropout, config.pipeline.sampling, config.pipeline.flip, model.partial_bn,
    ) == PUBLISHED[name]  # fmt: skip
    assert optimizer.base_batch == config.batch.global_batch
    assert (optimizer.momentum, optimizer.nesterov, optimizer.clip_norm) == (0.9, False, 20.0)
    assert (optimizer.bias_lr_multiplier, optimizer.classifier_lr_multiplier) == (2.0, 5.0)
    assert (schedule.decay, schedule.factor, schedule.warmup_epochs) == ("step", 0.1, 0.0)
    assert (model.backbone, model.num_frames, model.shift, model.fold_div) == ("resnet50", 8, "residual", 8)
    assert config.pipeline.crop_scales == [1.0, 0.875, 0.75, 0.66]
    assert config.pipeline.size == 224


FLOW = {
    "kinetics_flow": "kinetics_single_node",
    "something_v1_flow": "something_v1",
    "something_v2_flow": "something_v2",
}


@pytest.mark.parametrize("name", FLOW)
def test_a_flow_recipe_is_that_of_rgb_with_flows_crops_and_rates(name: str) -> None:
    """What the authors' code does with flow; the rest is the RGB recipe's, and the file says so."""
    config, rgb = experiment(name), experiment(FLOW[name])
    assert (config.model.modality, config.model.init, config.model.partial_bn) == ("flow", "imagenet", False)
    assert config.pipeline.crop_scales == [1.0, 0.875, 0.75]
    assert config.optimizer.first_conv_lr_multiplier == 5.0
    assert config.data.root == f"{rgb.data.root}_flow"
    assert config.data.prepare == f"python prepare.py flow --root {rgb.data.root} --to {config.data.root}"
    assert replace(config.model, modality="rgb") == rgb.model
    assert (config.optimizer, config.schedule, config.batch) == (rgb.optimizer, rgb.schedule, rgb.batch)
    assert replace(config.pipeline, crop_scales=rgb.pipeline.crop_scales) == rgb.pipeline
    assert replace(config.data, root=rgb.data.root, prepare=rgb.data.prepare) == rgb.data


@pytest.mark.parametrize("name", [*PUBLISHED, *FLOW, "something_v2_64"])
def test_every_experiment_says_its_source(name: str) -> None:
    from .test_config import CONF

    header = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert re.search(r"^# .*(Source|recipe of)", header, re.MULTILINE), "a header that says where the numbers come from"


@pytest.mark.parametrize("name", [*PUBLISHED, "kinetics_1536"])
def test_the_published_precision_is_the_default(name: str) -> None:
    """The authors' main.py and test_models.py have no half precision."""
    config = experiment(name)
    assert (config.numerics.dtype, config.numerics.amp, config.evaluation.amp) == ("float32", "off", "off")


@pytest.mark.parametrize(
    "name", ["kinetics_single_node", "kinetics_1536", "something_v1", "something_v2_64", "ucf101_finetune"]
)
def test_precision_is_stated(name: str) -> None:
    from .test_config import CONF

    assert "\n# Precision: " in (CONF / "experiment" / f"{name}.yaml").read_text()


def test_kinetics_starts_from_imagenet() -> None:
    assert experiment("kinetics_single_node").model.init == "imagenet"
    assert experiment("kinetics_dense", "model.init=random").model.init == "random"


@pytest.mark.parametrize("name", ["ucf101_finetune", "hmdb51_finetune"])
def test_a_fine_tune_without_a_start_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.init is empty.*Fix: model\.init=FILE"):
        from_composed(compose(f"experiment={name}"))


def test_the_rate_changes_at_the_published_epochs() -> None:
    ours = recipe(experiment("kinetics_single_node"), KINETICS_CLIPS)
    # 50 epochs of 1,873.3 steps.
    assert ours.total_steps == 93_664
    epoch_20, epoch_40 = (round(epoch * KINETICS_CLIPS / 128) for epoch in (20, 40))
    rates = [ours.schedule.learning_rate(step) for step in (0, epoch_20 - 1, epoch_20, epoch_40 - 1, epoch_40)]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002])


def test_twice_the_batch_has_twice_the_rate() -> None:
    """Official README: "if you use a batch size of 256 you should set learning rate to 0.04"."""
    ours = recipe(experiment("kinetics_single_node", "batch.global_batch=256"), KINETICS_CLIPS)
    assert ours.schedule.peak == pytest.approx(0.04)


def test_something_v2_on_64_processes() -> None:
    """The official recipe at 8 times its batch and rate, with 5 epochs of warm-up that start at the official rate."""
    config = experiment("something_v2_64")
    ours, official = recipe(config, SOMETHING_V2_CLIPS), recipe(experiment("something_v2"), SOMETHING_V2_CLIPS)
    assert (ours.global_batch, ours.bn_group, ours.epochs) == (512, 8, pytest.approx(official.epochs, rel=1e-3))
    assert ours.schedule.peak == pytest.approx(8 * official.schedule.peak) == pytest.approx(0.08)
    assert ours.schedule.warmup_steps == round(5 * SOMETHING_V2_CLIPS / 512)
    assert ours.schedule.learning_rate(0) == pytest.approx(official.schedule.peak, rel=1e-2)
    assert (ours.model, ours.augmentation) == (official.model, official.augmentation)
    world = config.plan.world_size
    assert world == 64
    assert make_execution(ours.global_batch, ours.bn_group, world).micro_batch == 8


@pytest.mark.parametrize(
    ("name", "clips", "worlds"),
    [("kinetics_single_node", KINETICS_CLIPS, (1, 2, 4, 8)), ("something_v1", SOMETHING_V1_CLIPS, (1, 4, 8))],
)
def test_the_batch_lies_on_the_usual_machines(name: str, clips: int, worlds: tuple[int, ...]) -> None:
    ours = recipe(experiment(name), clips)
    for world in worlds:
        execution = make_execution(ours.global_batch, ours.bn_group, world)
        assert execution.micro_batch * world * execution.accumulation == ours.global_batch


@pytest.mark.parametrize(
    "override",
    [
        "model=tsm_mobilenet_v2",
        "model=tsm_resnet101",
        "model=tsm_resnext101",
        "model.backbone=wide_resnet50_2",
        "model.num_frames=16",
        "model.non_local=true",
        "model.temporal_pool=true",
        "model.shift=none",
        "model.shift=block",
        "model.direction=past",
        "evaluation=dense_30",
        "evaluation=ten_crop",
    ],
)
def test_documented_variants_compose(override: str) -> None:
    experiment("kinetics_dense", override)


@pytest.mark.parametrize("name", ["something_v1", "something_v2", "jester"])
def test_labels_can_follow_the_mirror(name: str) -> None:
    config = experiment(name, "pipeline.flip=relabel")
    augmentation = augmentation_of(config.model, config.data, config.pipeline)
    assert ("left", "right") in augmentation.mirrored_words


def test_a_mirror_that_forgets_the_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.flip=on would give mirrored clips wrong labels"):
        experiment("something_v1", "pipeline.flip=on")

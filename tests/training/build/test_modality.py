"""model.modality: what is refused, the recipe, the input's normalisation, and the plan's estimates."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.checkpoint.store import Checkpoint
from tests.training.config.test_config import config_of
from training.build.normalise import Normaliser
from training.build.recipe import recipe_of
from training.config.schema import CheckpointConfig, Config, NumericsConfig
from training.errors import ConfigError
from training.evaluation.run_config import differing_views, settings_of
from training.planning.estimates import clip_bytes, estimate_network
from training.planning.summary import describe_network
from training.runs.resume import check_same
from training.runs.run_folder import RunFolder


def flow(*overrides: str) -> Config:
    """The smoke experiment with model.modality=flow, checked after the overrides."""
    return rgb("model.modality=flow", *overrides)


@cache
def rgb(*overrides: str) -> Config:
    return config_of("experiment=smoke", *overrides)


def recipe(config: Config) -> dict[str, Any]:
    """The recipe as a checkpoint holds it."""
    return recipe_of(config, 40, "digest").as_dict()


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("pipeline.sampling=stream", "pipeline.sampling=uniform"),
        ("evaluation=stream", "evaluation=centre"),
        ("evaluation.explain=12", "evaluation.explain=0"),
    ],
)
def test_what_needs_single_frames_is_refused(override: str, fix: str) -> None:
    past = "model.direction=past"
    rgb(past, override)
    with pytest.raises(
        ConfigError, match=re.escape(override.split("=")[0]) + rf".*model\.modality=flow\. Fix: {re.escape(fix)}"
    ):
        flow(past, override)


# --- The recipe -------------------------------------------------------------------------------------------------------


def resume(before: dict[str, Any], now: Config) -> None:
    checkpoint = Checkpoint({}, {}, {"step": 3, "recipe": before})
    check_same(CheckpointConfig(), False, recipe_of(now, 40, "digest"), {}, RunFolder(Path("outputs/mine")), checkpoint)


def test_recipes_of_rgb_networks_are_those_of_older_versions() -> None:
    """A complete run is recognized by its recipe's fingerprint."""
    factor = "optimizer.first_conv_lr_multiplier=5"
    of_rgb, of_flow = recipe(rgb(factor)), recipe(flow(factor))
    assert "modality" not in of_rgb["model"] and "first_conv_lr_multiplier" not in of_rgb["optimizer"]
    assert (of_flow["model"]["modality"], of_flow["optimizer"]["first_conv_lr_multiplier"]) == ("flow", 5.0)


def test_a_run_resumes_with_its_modality_only() -> None:
    resume(recipe(rgb()), rgb())
    resume(recipe(flow()), flow())
    with pytest.raises(ConfigError, match=r"model\.modality: 'rgb' then, 'flow' now.*Fix: "):
        resume(recipe(rgb()), flow())
    with pytest.raises(ConfigError, match=r"model\.modality: 'flow' then, 'rgb' now.*Fix: "):
        resume(recipe(flow()), rgb())


def test_a_recipe_that_names_no_modality_is_of_an_rgb_network() -> None:
    assert differing_views("run", settings_of(recipe(rgb())), rgb()) == []
    assert differing_views("run", settings_of(recipe(flow()), flow()), flow()) == []
    with pytest.raises(
        ConfigError, match=r"run was trained with model\.modality=rgb, not flow\. Fix: model\.modality=rgb"
    ):
        differing_views("run", settings_of(recipe(rgb())), flow())


# --- Input and estimates ----------------------------------------------------------------------------------------------


def test_flow_is_normalised_as_in_the_authors_code() -> None:
    """Values of 0 to 1, minus 0.5, over the mean of ImageNet's three standard deviations."""
    video_NTCHW = torch.randint(256, (2, 3, 10, 4, 4), dtype=torch.uint8)
    for channels_last in (False, True):
        numerics = NumericsConfig(dtype="float64", channels_last=channels_last)
        x_NTCHW = Normaliser(torch.device("cpu"), numerics, "flow")(video_NTCHW)
        expected_NTCHW = (video_NTCHW.double() / 255 - 0.5) / ((0.229 + 0.224 + 0.225) / 3)
        torch.testing.assert_close(x_NTCHW, expected_NTCHW, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("modality", ["rgb", "flow"])
def test_a_clip_of_the_other_modality_is_not_normalised(modality: str) -> None:
    other = {"rgb": 10, "flow": 3}[modality]
    with pytest.raises(RuntimeError):
        Normaliser(torch.device("cpu"), NumericsConfig(), modality)(torch.zeros(1, 2, other, 4, 4, dtype=torch.uint8))


def test_the_plan_counts_ten_channels() -> None:
    assert clip_bytes(8, 224, "flow") == 8 * 10 * 224 * 224
    config = flow()
    line = describe_network(config.model, 32, estimate_network(config.model, 10, 32, 4))
    assert "resnet18 on flow (10 channels), " in line

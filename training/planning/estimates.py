"""Numbers that follow from a configuration, its recipe and its execution: for the start-up lines and the dry run alike."""

from dataclasses import dataclass

import torch

from training.build.model import network_of
from training.config.schema import Config
from training.recipe import Recipe
from tsm.flops import clip_multiply_adds


@dataclass(frozen=True)
class NetworkFigures:
    """Size and cost of a network, from shapes alone."""

    parameters: int
    trained_parameters: int
    clip_multiply_adds: int
    gradient_bytes: int
    """What each process contributes to a step's all-reduce, as it travels (distributed.gradient_dtype)."""


def network_figures(config: Config) -> NetworkFigures:
    """Raises ConfigError for a network that cannot be."""
    with torch.device("meta"):
        network = network_of(config.model, config.data.num_classes)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    trained = sum(size for size, learns in sizes if learns)
    width = {"float16": 2, "float32": 8 if config.numerics.dtype == "float64" else 4}[config.distributed.gradient_dtype]
    return NetworkFigures(
        parameters=sum(size for size, _ in sizes),
        trained_parameters=trained,
        clip_multiply_adds=clip_multiply_adds(
            lambda: network_of(config.model, config.data.num_classes), config.pipeline.size
        ),
        gradient_bytes=trained * width,
    )


def ring_bytes(message_bytes: int, world: int) -> float:
    """What each process of a world sends when a message is reduced over a ring."""
    return 2 * message_bytes * (world - 1) / world


@dataclass(frozen=True)
class Rates:
    """What a step time means; nothing of it is measured here."""

    step_s: float
    step_s_from: str
    """The key that says it."""
    clips_per_s: float
    clips_per_s_per_process: float
    decoded_bytes_per_s: float
    """uint8 frames on their way to all devices."""
    duration_s: float
    """Of all steps, without evaluations, checkpoints and start-up."""


def clip_bytes(config: Config) -> int:
    """A clip as the loader hands it over: uint8."""
    return config.model.num_frames * 3 * config.pipeline.size**2


def rates_of(config: Config, recipe: Recipe, world: int) -> Rates | None:
    """At `plan.step_s`, or at the published time on the published world; None where neither is said."""
    plan, published = config.plan, config.plan.step_s is None and config.plan.world_size == world
    step_s = plan.published_step_s if published else plan.step_s
    if step_s is None:
        return None
    clips_per_s = recipe.global_batch / step_s
    return Rates(
        step_s=step_s,
        step_s_from="plan.published_step_s" if published else "plan.step_s",
        clips_per_s=clips_per_s,
        clips_per_s_per_process=clips_per_s / world,
        decoded_bytes_per_s=clips_per_s * clip_bytes(config),
        duration_s=recipe.total_steps * step_s,
    )

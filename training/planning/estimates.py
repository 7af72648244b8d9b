"""Estimate size, cost and throughput from configuration, recipe and execution. train.py and plan.py share these."""

from dataclasses import dataclass

import torch

from training.build.model import network_of
from training.config.schema import DistributedConfig, ModelConfig, NumericsConfig
from training.recipe import Recipe
from tsm.flops import clip_multiply_adds
from tsm.modality import INPUT_CHANNELS

from .simulator.step import STEP_FLOPS


@dataclass(frozen=True)
class NetworkEstimate:
    """Size and cost of a network, derived from tensor shapes only."""

    parameters: int
    trained_parameters: int
    clip_multiply_adds: int
    gradient_bytes: int
    """Bytes that each process contributes to a step's all-reduce (in distributed.gradient_dtype)."""


def estimate_network(model: ModelConfig, num_classes: int, size: int, value_bytes: int) -> NetworkEstimate:
    """Estimate a network for frames of `size` pixels, whose gradients are all-reduced in `value_bytes` per value.

    Raises ConfigError for settings that do not fit each other.
    """
    with torch.device("meta"):
        network = network_of(model, num_classes)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    trained = sum(numel for numel, requires_grad in sizes if requires_grad)
    return NetworkEstimate(
        parameters=sum(numel for numel, _ in sizes),
        trained_parameters=trained,
        clip_multiply_adds=clip_multiply_adds(lambda: network_of(model, num_classes), size),
        gradient_bytes=trained * value_bytes,
    )


def gradient_value_bytes(numerics: NumericsConfig, distributed: DistributedConfig) -> int:
    """Return the bytes of one gradient value in the all-reduce."""
    if distributed.gradient_dtype == "float16":
        return 2
    return 8 if numerics.dtype == "float64" else 4


def ring_bytes(message_bytes: int, world: int) -> float:
    """Return the bytes that each process sends in a ring all-reduce."""
    return 2 * message_bytes * (world - 1) / world


@dataclass(frozen=True)
class Rates:
    """Throughput and duration that follow from a step time, which is given or simulated."""

    step_s: float
    step_s_from: str
    """The key that gives it, or the cluster that it is simulated on."""
    clips_per_s: float
    clips_per_s_per_process: float
    decoded_bytes_per_s: float
    """uint8 frames, to all devices together."""
    duration_s: float
    """Of all steps, without evaluations, checkpoints and start-up."""
    tflop_s_per_process: float
    """6 FLOPs per multiply-add of a clip's forward pass."""


def clip_bytes(num_frames: int, size: int, modality: str = "rgb") -> int:
    """Return the size of a clip as the loader yields it: uint8."""
    return num_frames * INPUT_CHANNELS[modality] * size**2


def estimate_rates(
    step_s: float, step_s_from: str, recipe: Recipe, decoded_clip_bytes: int, multiply_adds: int, world: int
) -> Rates:
    """Return what a step time means."""
    clips_per_s = recipe.global_batch / step_s
    return Rates(
        step_s=step_s,
        step_s_from=step_s_from,
        clips_per_s=clips_per_s,
        clips_per_s_per_process=clips_per_s / world,
        decoded_bytes_per_s=clips_per_s * decoded_clip_bytes,
        duration_s=recipe.total_steps * step_s,
        tflop_s_per_process=STEP_FLOPS * multiply_adds * clips_per_s / world / 1e12,
    )

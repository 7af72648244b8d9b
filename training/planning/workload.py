"""Describe a configuration as the simulator's workload: the network's tensors in the order of backward, its batch and its input."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor, nn

from distributed.batch_norm.synchronized import message_bytes
from training.build.data import augmentation_of
from training.build.model import network_of
from training.config.schema import Config, NumericsConfig
from training.recipe import Execution, Recipe

from .estimates import gradient_value_bytes
from .simulator.overlap import Gradient
from .simulator.step import Layout, Workload

# Kinetics-400 has one validation clip for 12 training clips.
_TRAINING_CLIPS_PER_VALIDATION_CLIP = 12


def workload_of(
    config: Config,
    recipe: Recipe,
    clip_multiply_adds: int,
    checkpoint_bytes: int,
    stored_clip_bytes: float | None,
    validation_clips: int | None,
) -> Workload:
    """Return what a run computes and sends. `validation_clips`: None: unknown, then a twelfth of the training clips."""
    model, classes, size = config.model, config.data.num_classes, config.pipeline.size
    value_bytes = gradient_value_bytes(config.numerics, config.distributed)
    with torch.device("meta"):
        network = network_of(model, classes)
        video_NTCHW = torch.empty(1, model.num_frames, network.in_channels, size, size)
    frames = augmentation_of(model, config.data, config.pipeline).sample_frames
    messages, message_bytes_all = _bn_messages(network)
    epochs = recipe.epochs
    return Workload(
        # A burn-in's frames cost what the clip's frames do.
        clip_multiply_adds=clip_multiply_adds * frames // model.num_frames,
        gradients_P=gradients_of(network, lambda: network(video_NTCHW), value_bytes),
        precision=precision_of(config.numerics),
        global_batch=recipe.global_batch,
        total_steps=recipe.total_steps,
        bn_messages=messages,
        bn_message_bytes=message_bytes_all,
        frames=frames,
        evaluations=ceil(epochs / config.evaluation.every_epochs),
        evaluation_clips=validation_clips or recipe.num_rows // _TRAINING_CLIPS_PER_VALIDATION_CLIP,
        checkpoints=ceil(epochs / config.checkpoint.every_epochs),
        checkpoint_bytes=checkpoint_bytes,
        stored_clip_bytes=stored_clip_bytes,
        prepared=config.plan.prepared,
        fp32_ratio=2.0 if config.distributed.gradient_dtype == "float16" else 1.0,
        backend="horovod" if config.distributed.backend == "horovod" else "torch",
    )


def layout_of(execution: Execution) -> Layout:
    """Return an execution as the simulator's layout."""
    return Layout(execution.world, execution.micro_batch, execution.accumulation, execution.bn_ranks)


def precision_of(numerics: NumericsConfig) -> str:
    """Return the precision in which a GPU would multiply: tf32 stands for float32 where numerics.tf32 allows it."""
    if numerics.dtype == "float64":
        return "float64"
    if numerics.amp != "off":
        return numerics.amp
    return "tf32" if numerics.tf32 else "float32"


def on_device(workload: Workload, known: set[str]) -> Workload:
    """Return the workload in float32 if the device has no TF32."""
    return replace(workload, precision="float32") if workload.precision == "tf32" and "tf32" not in known else workload


def gradients_of(network: nn.Module, forward: Callable[[], object], value_bytes: int) -> tuple[Gradient, ...]:
    """Return the trained tensors in the order in which backward makes their gradients, with their multiply-adds per forward pass.

    A layer's multiply-adds are the values of its weight times the places at which it is applied, from a forward pass on the meta
    device. Backward takes the layers in the opposite order.
    """
    places: dict[nn.Module, int] = {}
    order: list[nn.Module] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        order.append(module)
        channels = output.shape[1] if isinstance(module, nn.modules.conv._ConvNd) else output.shape[-1]
        places[module] = output.numel() // channels

    def note_order(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        order.append(module)

    hooks = []
    for module in network.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            hooks.append(module.register_forward_hook(note))
        elif list(module.parameters(recurse=False)):
            hooks.append(module.register_forward_hook(note_order))
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    gradients = []
    for module in reversed(list(dict.fromkeys(order))):
        own = [(name, each) for name, each in module.named_parameters(recurse=False) if each.requires_grad]
        for name, parameter in reversed(own):
            multiply_adds = parameter.numel() * places.get(module, 0) if name == "weight" else 0
            gradients.append(Gradient(parameter.numel() * value_bytes, multiply_adds))
    return tuple(gradients)


def _bn_messages(network: nn.Module) -> tuple[int, int]:
    """Return the all-reduces of batch norm per micro-step if its groups span ranks, and their bytes."""
    norms = [each for each in network.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.training]
    return 2 * len(norms), sum(sum(message_bytes(each.num_features, torch.float32)) for each in norms)

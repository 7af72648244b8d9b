"""Optimizers, and what each parameter's learning rate and weight decay are in them."""

from typing import Any

import torch
from torch import Tensor, nn

from .schema import OptimizerConfig


def parameter_groups(network: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trained parameters in groups of one learning-rate multiplier and weight decay each, as the official TSM has them.

    Weights of convolutions and of the classifier decay; biases and everything of a batch norm do not. `bias_lr_multiplier`
    (officially 2) is for the biases of convolutions and classifier, `classifier_lr_multiplier` (5) for weight and bias of
    the classifier on top of that; batch norm learns at the plain rate. Each group has `name` and `lr_multiplier`.

    Source: `get_optim_policies` in ops/models.py of mit-han-lab/temporal-shift-module.
    """
    groups: dict[str, dict[str, Any]] = {}
    classifier = network.get_submodule("classifier")
    for module in network.modules():
        part = "classifier" if module is classifier else "backbone"
        factor = config.classifier_lr_multiplier if module is classifier else 1.0
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if parameter.dim() > 1:
                key, multiplier, decay = f"{part}.weight", factor, config.weight_decay
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                key, multiplier, decay = "batch_norm", 1.0, 0.0
            elif name == "bias":
                key, multiplier, decay = f"{part}.bias", factor * config.bias_lr_multiplier, 0.0
            else:
                raise TypeError(f"no rule for the learning rate of {name} in a {type(module).__name__}")
            group = groups.setdefault(
                key, {"name": key, "params": [], "lr_multiplier": multiplier, "weight_decay": decay}
            )
            group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of the configuration; its learning rates are set before every step (`set_learning_rate`)."""
    optimizer = torch.optim.SGD(
        parameter_groups(network, config), lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=True
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # As after a step with no gradient, so that every rank can be sent a resumed run's state.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The schedule's rate for the coming step, times each group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_multiplier"]


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name; the tensors are the live ones."""
    return {
        f"{name}.{kind}": tensor
        for name, parameter in network.named_parameters()
        for kind, tensor in optimizer.state[parameter].items()
        if isinstance(tensor, Tensor)
    }

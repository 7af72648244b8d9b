"""Make the optimizer, and set learning rate and weight decay per parameter group."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from training.config.schema import OptimizerConfig
from training.errors import ConfigError
from tsm.modality import first_convolution
from tsm.networks import TemporalNetwork

from .lars import Lars


def parameter_groups(network: TemporalNetwork, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group the trained parameters by learning-rate multiplier and weight decay, as the official TSM does.

    Weights of convolutions and classifier have weight decay; biases and BN parameters have none. `bias_lr_multiplier`
    (officially 2) applies to the biases of convolutions and classifier. `classifier_lr_multiplier` (5) applies to weight and
    bias of the classifier, on top of that, and `first_conv_lr_multiplier` (5) to the first convolution of a flow network. BN has
    the plain rate. Each group has `name` and `lr_multiplier`.

    Source: `get_optim_policies` in ops/models.py of mit-han-lab/temporal-shift-module.
    """
    groups: dict[str, dict[str, Any]] = {}
    parts: dict[nn.Module, tuple[str, float]] = {network.classifier: ("classifier", config.classifier_lr_multiplier)}
    if network.modality == "flow":
        parts[first_convolution(network)[1]] = "first_conv", config.first_conv_lr_multiplier
    for module in network.modules():
        part, factor = parts.get(module, ("backbone", 1.0))
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


def make_optimizer(network: TemporalNetwork, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make the optimizer. `set_learning_rate` sets its rates before every step.

    All state tensors exist from the start, so that a resumed run's state can be broadcast to every rank.

    Raises ConfigError if the optimizer needs a package that is not installed.
    """
    groups = parameter_groups(network, config)
    if config.name == "lars":
        for group in groups:
            group["adapt"] = group["name"].endswith(".weight")
        return Lars(groups, momentum=config.momentum, trust_coefficient=config.trust_coefficient, eps=config.eps)
    if config.name == "lamb":
        return _make_lamb(groups, config)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _make_lamb(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make LAMB (You et al., arXiv:1904.00962): apex's fused one on GPUs if NVIDIA's apex is installed, else timm's.

    Neither adapts a tensor without weight decay. Their own gradient clipping is off: the training step clips.
    """
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    options: dict[str, Any] = {"lr": 0.0, "betas": (config.momentum, config.beta2), "eps": config.eps}
    fused = _apex_fused_lamb() if on_gpu else None
    if fused is not None:
        optimizer = fused(groups, **options, max_grad_norm=math.inf)
    else:
        try:
            from timm.optim import Lamb
        except ImportError as error:
            raise ConfigError(
                "optimizer.name=lamb needs the package timm. Fix: pip install -c constraints.txt timm"
            ) from error
        optimizer = Lamb(groups, **options, max_grad_norm=None)
    for group in optimizer.param_groups:
        if fused is not None:
            group["step"] = 0
        else:
            group["step"] = DeviceStepCount(group["params"][0].device) if on_gpu else torch.zeros(())
        for parameter in group["params"]:
            state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            optimizer.state[parameter].update(state)
    return optimizer  # type: ignore[no-any-return]


class DeviceStepCount:
    """Number of steps that a group has taken, as a tensor on the device (`count`, float64).

    timm's LAMB computes its bias corrections as `1 - beta ** step`. With a step tensor on the CPU they are floats. But only
    the device knows whether a step was skipped, and the host would have to wait for it. With this class the corrections are
    tensors on the device, which timm's LAMB accepts too.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def add_(self, steps: int) -> None:
        self.count.add_(steps)

    def fill_(self, steps: int) -> None:
        self.count.fill_(steps)

    def __rpow__(self, beta: float) -> Tensor:
        return beta**self.count

    def __int__(self) -> int:
        """Return the count; waits for the device."""
        return int(self.count)


def _apex_fused_lamb() -> Any:
    """Import FusedLAMB of NVIDIA's apex, or return None. The package of that name on PyPI is another one."""
    try:
        from apex.optimizers import FusedLAMB
    except ImportError:
        return None
    return FusedLAMB


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Describe the implementation in use, for the log."""
    kind = type(optimizer)
    if isinstance(optimizer, Lars):
        how = "one buffer per group" if optimizer.flat else "torch's fused SGD kernel for each tensor"
    else:
        how = "fused" if optimizer.defaults.get("fused") or "Fused" in kind.__name__ else "not fused"
    return f"{kind.__module__.split('.')[0]}'s {kind.__name__} ({how})"


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set each group's rate for the next step: the schedule's rate times the group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_multiplier"]


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the live tensors of the optimizer's state, by parameter name."""
    return {
        f"{name}.{kind}": tensor
        for name, parameter in network.named_parameters()
        for kind, tensor in optimizer.state[parameter].items()
        if isinstance(tensor, Tensor)
    }


def step_counts(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the steps taken by each group, if the optimizer counts them (LAMB, for its bias correction)."""
    return {group["name"]: int(group["step"]) for group in optimizer.param_groups if "step" in group}


def set_step_counts(optimizer: torch.optim.Optimizer, counts: dict[str, int]) -> None:
    """Restore what `step_counts` returned. Groups that it does not name start at 0."""
    for group in optimizer.param_groups:
        if group["name"] not in counts:
            continue
        if isinstance(group.get("step"), Tensor | DeviceStepCount):
            group["step"].fill_(counts[group["name"]])
        elif "step" in group:
            group["step"] = counts[group["name"]]

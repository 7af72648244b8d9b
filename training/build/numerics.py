"""Precision and memory format: torch's switches, autocast, the network's placement, and the check that the device can do it."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from training.config.schema import Config, NumericsConfig
from training.errors import ConfigError

_AMP_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def set_numerics(config: Config) -> None:
    """Set torch's process-wide switches and the seed as the configuration says."""
    numerics = config.numerics
    torch.backends.cuda.matmul.allow_tf32 = numerics.tf32
    torch.backends.cudnn.allow_tf32 = numerics.tf32
    torch.backends.cudnn.benchmark = numerics.cudnn_benchmark and not numerics.deterministic
    if numerics.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # The default fills every torch.empty with NaN, a kernel each. It finds reads of uninitialized memory and makes no
        # operation deterministic; a test trains with it once instead.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(config.seed)


def check_device(config: Config, device: torch.device) -> None:
    """Refuse bfloat16 on a GPU that has no bfloat16 arithmetic and would emulate it. Raises ConfigError."""
    if device.type != "cuda":
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return
    remedies = {
        "numerics.amp": (config.numerics.amp, "numerics=gpu_fp16, or numerics.amp=float16"),
        "evaluation.amp": (config.evaluation.amp, "evaluation.amp=float16 or off"),
    }
    for key, (amp, remedy) in remedies.items():
        if amp == "bfloat16":
            raise ConfigError(
                f"{key}=bfloat16 needs a GPU of compute capability 8.0 or higher (Ampere), and {name} has "
                f"{capability[0]}.{capability[1]}. Fix: {remedy}"
            )


def parameter_dtype(numerics: NumericsConfig) -> torch.dtype:
    """The type of weights, statistics and optimizer state."""
    return torch.float64 if numerics.dtype == "float64" else torch.float32


def autocast(device: torch.device, amp: str) -> AbstractContextManager[object]:
    """Autocast to `amp`: bfloat16 or float16; a context that does nothing for off."""
    return nullcontext() if amp == "off" else torch.autocast(device.type, _AMP_TYPES[amp])


def place_network(network: nn.Module, device: torch.device, numerics: NumericsConfig) -> None:
    """Move a network to its device, dtype and memory format, in place; parameters stay the same objects."""
    network.to(device, parameter_dtype(numerics))
    if numerics.channels_last:
        for parameter in network.parameters():
            # Only weights of 2D convolutions have this format. The 1x1x1 ones of non-local blocks need none: their memory
            # is the same in both.
            if parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)

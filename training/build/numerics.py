"""Set precision and memory format: torch's switches, autocast, dtypes, network placement, and the device check."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from training.config.schema import EvaluationConfig, NumericsConfig
from training.errors import ConfigError

_AMP_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def set_numerics(numerics: NumericsConfig, seed: int) -> None:
    """Set torch's process-wide switches and seed."""
    torch.backends.cuda.matmul.allow_tf32 = numerics.tf32
    torch.backends.cudnn.allow_tf32 = numerics.tf32
    torch.backends.cudnn.benchmark = numerics.cudnn_benchmark and not numerics.deterministic
    if numerics.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # The default fills every torch.empty with NaN, at the cost of one kernel each. That finds reads of uninitialized
        # memory, and makes no operation deterministic. A test trains with it once instead.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)


def check_device(numerics: NumericsConfig, evaluation: EvaluationConfig, device: torch.device) -> None:
    """Raise ConfigError if bfloat16 is configured on a GPU without bfloat16 arithmetic, which would emulate it."""
    if device.type != "cuda":
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return
    remedies = {
        "numerics.amp": (numerics.amp, "numerics=gpu_fp16, or numerics.amp=float16"),
        "evaluation.amp": (evaluation.amp, "evaluation.amp=float16 or off"),
    }
    for key, (amp, remedy) in remedies.items():
        if amp == "bfloat16":
            raise ConfigError(
                f"{key}=bfloat16 needs a GPU of compute capability 8.0 or higher (Ampere), and {name} has "
                f"{capability[0]}.{capability[1]}. Fix: {remedy}"
            )


def parameter_dtype(numerics: NumericsConfig) -> torch.dtype:
    """Return the dtype of weights, statistics and optimizer state."""
    return torch.float64 if numerics.dtype == "float64" else torch.float32


def autocast(device: torch.device, amp: str) -> AbstractContextManager[object]:
    """Return a context that autocasts to `amp` (bfloat16 or float16), or does nothing for `off`."""
    return nullcontext() if amp == "off" else torch.autocast(device.type, _AMP_TYPES[amp])


def place_network(network: nn.Module, device: torch.device, numerics: NumericsConfig) -> None:
    """Move a network to its device, dtype and memory format, in place. Parameters stay the same objects."""
    network.to(device, parameter_dtype(numerics))
    if numerics.channels_last:
        for parameter in network.parameters():
            # Only weights of 2D convolutions have this format. The 1x1x1 weights of non-local blocks are the same in both.
            if parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)

"""Memory layouts that torch's batch-norm kernels take without a copy."""

import torch
from torch import Tensor


def dense(x_BC: Tensor) -> Tensor:
    """Return the tensor itself if it is channels-last or contiguous, else a contiguous copy."""
    return x_BC.contiguous(memory_format=_memory_format(x_BC))


def in_layout_of(x_BC: Tensor, grad_BC: Tensor) -> Tensor:
    """Return the gradient in the memory layout of `x_BC`, a result of `dense`."""
    return grad_BC.contiguous(memory_format=_memory_format(x_BC))


def _memory_format(x_BC: Tensor) -> torch.memory_format:
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x_BC.dim())
    if channels_last is None or x_BC.is_contiguous() or not x_BC.is_contiguous(memory_format=channels_last):
        return torch.contiguous_format
    return channels_last

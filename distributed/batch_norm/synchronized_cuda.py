"""Batch norm over ranks on CUDA: the formulas and messages of `synchronized`, in few kernels.

A small kernel takes the host longer to launch than the GPU to run. A layer needs 7 of them besides its all-reduces: forward,
torch's statistics kernel, one to pack the message, one to unpack it, and torch's elementwise kernel; backward, torch's sums,
their concatenation into the message, and torch's elementwise kernel. The four torch kernels are those of its SyncBatchNorm,
which gathers the statistics of all ranks instead of their sum, so that its message grows with the group.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from runtime.triton_launch import triton_can_launch

from . import messages
from .layouts import dense, in_layout_of
from .messages import GroupStatistics, RunningUpdate, SumOverGroup


def synchronized_norm_cuda(
    x_BC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    sum_over_group: SumOverGroup,
    running: RunningUpdate | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `synchronized.synchronized_norm`. The tensors are on the current device."""
    x_BC = dense(x_BC)
    statistics, count = _group_statistics(x_BC.detach(), eps, sum_over_group, running)
    out_BC: Tensor = _Normalize.apply(x_BC, weight_C, bias_C, eps, sum_over_group, statistics)
    return out_BC, statistics.mean_C, statistics.unbiased_var_C, count


def _group_statistics(
    x_BC: Tensor, eps: float, sum_over_group: SumOverGroup, running: RunningUpdate | None
) -> tuple[GroupStatistics, Tensor]:
    """Return the group's statistics and its float64 count of values per channel, by the forward message."""
    kernels = message_kernels()
    # float32 for half-precision inputs.
    mean_C, var_C = torch.batch_norm_update_stats(_images(x_BC), None, None, 0.0)
    message = kernels.pack_moments(mean_C, var_C, x_BC.numel() // x_BC.shape[1])
    sum_over_group(message, "statistics")
    return kernels.unpack_statistics(message, mean_C.dtype, eps, running), message[-1]


class _Normalize(torch.autograd.Function):
    """Normalizes by the statistics of the group. Its gradient includes that of the statistics, which are functions of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BC: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        eps: float,
        sum_over_group: SumOverGroup,
        statistics: GroupStatistics,
    ) -> Tensor:
        mean_C, inverse_std_C, _, count_parts = statistics
        ctx.save_for_backward(x_BC, weight_C, mean_C, inverse_std_C, count_parts)
        ctx.sum_over_group = sum_over_group
        # The output must not be a view: the ReLU after it works in place, which would make autograd copy it.
        out_BC = torch.empty_like(x_BC)
        torch.batch_norm_elemt(_images(x_BC), weight_C, bias_C, mean_C, inverse_std_C, eps, out=_images(out_BC))
        return out_BC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BC: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_BC, weight_C, mean_C, inverse_std_C, count_parts = ctx.saved_tensors
        shape, grad_BC, x_BC = x_BC.shape, _images(in_layout_of(x_BC, grad_BC)), _images(x_BC)
        affine = weight_C is not None
        sum_grad_C, sum_centered_grad_C, grad_weight_C, grad_bias_C = torch.batch_norm_backward_reduce(
            grad_BC, x_BC, mean_C, inverse_std_C, weight_C, True, affine, affine
        )
        grad_x_BC = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat([sum_grad_C, sum_centered_grad_C])
            ctx.sum_over_group(sums, "gradients")
            sum_grad_C, sum_centered_grad_C = sums.chunk(2)
            grad_x_BC = torch.batch_norm_backward_elemt(
                grad_BC, x_BC, mean_C, inverse_std_C, weight_C, sum_grad_C, sum_centered_grad_C, count_parts
            ).view(shape)
        return grad_x_BC, grad_weight_C if affine else None, grad_bias_C if affine else None, None, None, None


def _images(x_BC: Tensor) -> Tensor:
    """Return a view with at most the four dimensions that torch's channels-last kernels take: joins frames to one image."""
    return x_BC.flatten(2, 3) if x_BC.dim() == 5 else x_BC


@functools.cache
def message_kernels() -> ModuleType:
    """Return `messages_triton`, or `messages` where Triton is missing or cannot launch."""
    if not triton_can_launch():
        return messages
    # A late import: only processes with CUDA tensors pay the cost of importing Triton.
    from . import messages_triton

    return messages_triton

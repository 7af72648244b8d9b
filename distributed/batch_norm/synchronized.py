"""Batch norm over a group of ranks: the computation on each rank, and the two messages that combine the ranks.

Forward, a rank reduces its part to a count n_i, means m_i and squared deviations M_i about its own means, with the kernel of
torch's batch norm. The group's are (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances", 1979)

    n = sum n_i,    m = sum n_i m_i / n,    M = sum M_i + sum n_i (m_i - m)^2,    var = M / n.

A single all-reduce cannot know m beforehand, so ranks send the last sum expanded about 0, `sum n_i m_i^2 - n m^2`, in float64.
That gives var a relative error of 2e-16 * (1 + m^2 / var), which is below float32's rounding while |m| < 1e4 standard
deviations, and the message size depends on neither the group nor its batches. (The same sum in float32 would lose half its
digits at |m| = 50 standard deviations.) Counts are part of the message, so ranks may hold parts of different sizes.

Backward, a second message holds the sums of the gradient and of the gradient times the normalised input (on CUDA: times the
centered input, as torch's kernels take it). This module computes on CPUs; `synchronized_cuda` does the same in few kernels.

Messages of different layers cannot be fused: a layer's statistics depend on the layer before it, so each layer needs two
messages per micro-step. Only the two norms at the end of a residual block with a downsampling path could share theirs, 4 of 53
layers in a ResNet-50, with a forward pass of our own for these blocks. The host never waits for its device here; whether it
waits for a message depends on the backend (with Horovod it does).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layouts import dense, in_layout_of
from .messages import RunningUpdate, SumOverGroup, pack_moments, unpack_moments
from .synchronized_cuda import synchronized_norm_cuda

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def message_bytes(channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes that a rank sends forward and backward for one layer whose input has this dtype."""
    return (2 * channels + 1) * 8, 2 * channels * _statistics_dtype(dtype).itemsize


def synchronized_norm(
    x_BC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    sum_over_group: SumOverGroup,
    running: RunningUpdate | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise this rank's part (B, C, ...) of a group by the statistics of the whole group.

    Returns `(out_BC, mean_C, unbiased_var_C, count)`; the last three have no gradient. Applies `running` with these statistics.
    They are float32, or float64 for float64 inputs, also under autocast. No rank of the group may have an empty part.
    """
    if x_BC.is_cuda:
        return synchronized_norm_cuda(x_BC, weight_C, bias_C, eps, sum_over_group, running)
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _SynchronizedNorm.apply(x_BC, weight_C, bias_C, eps, sum_over_group)
    if running is not None:
        _, mean_C, unbiased_var_C, _ = out
        running.apply_(mean_C, unbiased_var_C)
    return out


class _SynchronizedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BC: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        eps: float,
        sum_over_group: SumOverGroup,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_BC = dense(x_BC)
        mean_C, var_C, count = group_statistics(x_BC, sum_over_group)
        out_BC = torch.nn.functional.batch_norm(x_BC, mean_C, var_C, weight_C, bias_C, False, 0.0, eps)
        unbiased_var_C = var_C * (count / (count - 1))
        ctx.save_for_backward(x_BC, weight_C, mean_C, var_C, count)
        ctx.eps, ctx.sum_over_group = eps, sum_over_group
        ctx.mark_non_differentiable(mean_C, unbiased_var_C, count)
        # Otherwise autograd would create a tensor of zeros for each of the three.
        ctx.set_materialize_grads(False)
        return out_BC, mean_C, unbiased_var_C, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BC: Tensor, *no_grads: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_BC, weight_C, mean_C, var_C, count = ctx.saved_tensors
        grad_BC = in_layout_of(x_BC, grad_BC)
        # In evaluation mode torch's kernel returns this rank's two sums as the gradients of weight and bias.
        _, grad_weight_C, grad_bias_C = torch.ops.aten.native_batch_norm_backward(
            grad_BC, x_BC, weight_C, mean_C, var_C, None, None, False, ctx.eps, [False, True, True]
        )
        grad_x_BC = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat([grad_weight_C, grad_bias_C])
            ctx.sum_over_group(sums, "gradients")
            grad_x_BC = _input_gradient(grad_BC, x_BC, weight_C, mean_C, var_C, ctx.eps, sums, count)
        if weight_C is None:
            grad_weight_C = grad_bias_C = None
        return grad_x_BC, grad_weight_C, grad_bias_C, None, None


def group_statistics(x_BC: Tensor, sum_over_group: SumOverGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(mean_C, var_C, count)` of the group, with the biased variance, from this rank's part: the forward message."""
    dtype = _statistics_dtype(x_BC.dtype)
    message = pack_moments(*_local_statistics(x_BC, dtype), x_BC.numel() // x_BC.shape[1])
    sum_over_group(message, "statistics")
    return unpack_moments(message, dtype)


def _local_statistics(x_BC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel. (torch.var_mean is 3 to 70 times slower here on a CPU.)"""
    if x_BC.dtype in _LOW_PRECISION:
        # On a CPU the result has the dtype of the running statistics, which stay unchanged.
        unused_2C = torch.zeros(2, x_BC.shape[1], dtype=dtype, device=x_BC.device)
        return torch.batch_norm_update_stats(x_BC, unused_2C[0], unused_2C[1], 0.0)
    return torch.batch_norm_update_stats(x_BC, None, None, 0.0)


def _input_gradient(
    grad_BC: Tensor,
    x_BC: Tensor,
    weight_C: Tensor | None,
    mean_C: Tensor,
    var_C: Tensor,
    eps: float,
    sums: Tensor,
    count: Tensor,
) -> Tensor:
    """Return `weight / std * (grad - mean(grad) - xhat * mean(xhat * grad))`, linear in grad and x: two passes over them.

    `sums`: of xhat * grad and of grad over the group, (2C,).
    """
    inverse_std_C = (var_C + eps).rsqrt()
    scale_C = inverse_std_C if weight_C is None else weight_C * inverse_std_C
    mean_xhat_grad_C, mean_grad_C = (sums / count).chunk(2)
    slope_C = -scale_C * inverse_std_C * mean_xhat_grad_C
    constant_C = -scale_C * mean_grad_C - slope_C * mean_C
    shape = [-1 if dim == 1 else 1 for dim in range(x_BC.dim())]
    # float32 for half-precision inputs too.
    grad_x_BC = torch.addcmul(constant_C.view(shape), grad_BC, scale_C.view(shape))
    return grad_x_BC.addcmul_(x_BC, slope_C.view(shape)).to(x_BC.dtype)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

"""Normalising by statistics of a group of ranks: what each rank computes, and the two messages that join the ranks.

Forward, a rank reduces its part to a count n_i, means m_i and squared deviations M_i about its own means, by the kernel that
torch's own batch norm uses. The group's are (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances", 1979)

    n = sum n_i,    m = sum n_i m_i / n,    M = sum M_i + sum n_i (m_i - m)^2,    var = M / n.

One all-reduce cannot know m beforehand, so the last sum travels expanded about 0, `sum n_i m_i^2 - n m^2`. In float64: that
costs var a relative error of 2e-16 * (1 + m^2 / var), which is below float32's own rounding as long as |m| < 1e4 standard
deviations, and the message grows with neither the group nor its batches. (The same sum in float32 would lose half its digits at
|m| = 50 standard deviations.) Counts travel along, so that parts may differ in size.

Backward, one more message carries the sums of the gradient and of the gradient times the normalised input (on CUDA: times the
centered one, as torch's kernels take it). This module computes on CPUs; `synchronized_norm_cuda` does the same in few kernels.

What cannot be fused: a layer's statistics depend on the layer before it, so each layer costs two messages a micro-step. The two
norms at the end of a residual block with a downsampling path could share theirs, 4 of 53 layers in a ResNet-50, at the price of
a forward pass of our own for these blocks. The host never waits for its device here; whether a message makes it wait is up to the
backend (Horovod's do).
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
    """What a rank sends forward and backward for one layer whose input has this type."""
    return (2 * channels + 1) * 8, 2 * channels * _statistics_dtype(dtype).itemsize


def synchronized_norm(
    x_BC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    sum_over_group: SumOverGroup,
    running: RunningUpdate | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm of this rank's part (B, C, ...) of a group by the statistics of the whole group.

    Returns `(out_BC, mean_C, unbiased_var_C, count)`; the last three carry no gradient. Applies `running` to these statistics.
    They are float32, or float64 for float64 inputs, whatever autocast says. Every rank of the group must have a part that is not
    empty.
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
        ctx.set_materialize_grads(False)  # or each of the three would get a tensor of zeros
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
    """`(mean_C, var_C, count)` over the group, with the biased variance, from this rank's part: the message forward."""
    dtype = _statistics_dtype(x_BC.dtype)
    message = pack_moments(*_local_statistics(x_BC, dtype), x_BC.numel() // x_BC.shape[1])
    sum_over_group(message, "statistics")
    return unpack_moments(message, dtype)


def _local_statistics(x_BC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel. (torch.var_mean is 3 to 70 times as slow here on a CPU.)"""
    if x_BC.dtype in _LOW_PRECISION:
        # The types of the running statistics, which come out unchanged, are those of the result on a CPU.
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
    """`weight / std * (grad - mean(grad) - xhat * mean(xhat * grad))`, linear in grad and x: two passes over them.

    `sums`: of xhat * grad and of grad over the group, (2C,).
    """
    inverse_std_C = (var_C + eps).rsqrt()
    scale_C = inverse_std_C if weight_C is None else weight_C * inverse_std_C
    mean_xhat_grad_C, mean_grad_C = (sums / count).chunk(2)
    slope_C = -scale_C * inverse_std_C * mean_xhat_grad_C
    constant_C = -scale_C * mean_grad_C - slope_C * mean_C
    shape = [-1 if dim == 1 else 1 for dim in range(x_BC.dim())]
    grad_x_BC = torch.addcmul(constant_C.view(shape), grad_BC, scale_C.view(shape))  # float32 for half precision too
    return grad_x_BC.addcmul_(x_BC, slope_C.view(shape)).to(x_BC.dtype)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

"""The message that combines the batch-norm statistics of ranks: pack, unpack, and update running statistics from it.

`synchronized` has the formulas. This module computes them with torch's operators, on any device. `messages_triton` needs one
CUDA kernel before the all-reduce and one after it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SumOverGroup = Callable[[Tensor, str], None]
"""Sums a tensor over the ranks of a group, in place; the text distinguishes the messages of a layer."""

COUNT_PARTS = 8
"""torch's backward kernel takes int32 counts and sums them. A single count would overflow at 2**31 values per channel, which 1,536
GPUs reach with 14 clips each (8 frames, 112 x 112 activations)."""


class RunningUpdate(NamedTuple):
    """An exponential update of running statistics, in place: `running = decay * running + gain * new`."""

    mean_C: Tensor
    var_C: Tensor
    decay: float
    gain: float

    def apply_(self, mean_C: Tensor, unbiased_var_C: Tensor) -> None:
        running = [self.mean_C, self.var_C]
        if self.decay != 1.0:
            torch._foreach_mul_(running, self.decay)
        torch._foreach_add_(running, [mean_C, unbiased_var_C], alpha=self.gain)


class GroupStatistics(NamedTuple):
    """Statistics of a group, as torch's CUDA kernels take them."""

    mean_C: Tensor
    inverse_std_C: Tensor
    unbiased_var_C: Tensor
    count_parts: Tensor
    """int32, (COUNT_PARTS,): their sum is the group's number of values per channel."""


def pack_moments(mean_C: Tensor, var_C: Tensor, count: int) -> Tensor:
    """Return a rank's message: `n m`, `n (var + m^2)` and `n`, shape (2C + 1), float64.

    `mean_C`, `var_C` (biased): of the rank's `count` values per channel.
    """
    channels = len(mean_C)
    message = torch.empty(2 * channels + 1, dtype=torch.float64, device=mean_C.device)
    first_C, second_C, total = message[:channels], message[channels:-1], message[-1]
    first_C.copy_(mean_C)
    second_C.copy_(var_C).addcmul_(first_C, first_C)
    total.fill_(1.0)
    return message.mul_(count)


def unpack_moments(message: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(mean_C, var_C, count)` of the group, with the biased variance, from the sum of its messages.

    Overwrites the message up to its last element, the count.
    """
    channels = len(message) // 2
    first_C, second_C, total = message[:channels], message[channels:-1], message[-1]
    message[:-1].div_(total)
    mean_C = first_C.to(dtype, copy=True)
    var_C = second_C.addcmul_(first_C, first_C, value=-1).clamp_(min=0).to(dtype, copy=True)
    return mean_C, var_C, total.clone()


def unpack_statistics(
    message: Tensor, dtype: torch.dtype, eps: float, running: RunningUpdate | None
) -> GroupStatistics:
    """Return the group's statistics from the sum of its messages, and apply the update of running statistics, if any.

    Overwrites the message as `unpack_moments` does.
    """
    mean_C, var_C, count = unpack_moments(message, dtype)
    unbiased_var_C = var_C * (count / (count - 1))
    if running is not None:
        running.apply_(mean_C, unbiased_var_C)
    # The sum of floor((n + i) / parts) over i is n.
    part = torch.arange(COUNT_PARTS, dtype=torch.float64, device=message.device)
    count_parts = part.add_(count).div_(COUNT_PARTS).to(torch.int32)
    return GroupStatistics(mean_C, (var_C + eps).rsqrt_(), unbiased_var_C, count_parts)

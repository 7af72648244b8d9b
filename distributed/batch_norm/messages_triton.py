"""Triton kernels for batch norm over ranks: one packs a rank's message, one unpacks the sum and updates running statistics.

They compute the values of `messages`, rounded once: all arithmetic between loads and stores is float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .messages import COUNT_PARTS, GroupStatistics, RunningUpdate

# Channels per program.
BLOCK = 128


# Channels and counts are not specialized, so that all layers share two compiled kernels. Triton passes a Python float as float32
# unless its type is annotated.
@triton.jit(do_not_specialize=["channels", "count"])
def _pack_kernel(mean_ptr, var_ptr, message_ptr, channels, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    channel_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside_B = channel_B < channels
    mean_B = tl.load(mean_ptr + channel_B, mask=is_inside_B).to(tl.float64)
    var_B = tl.load(var_ptr + channel_B, mask=is_inside_B).to(tl.float64)
    total = count.to(tl.float64)
    tl.store(message_ptr + channel_B, mean_B * total, mask=is_inside_B)
    tl.store(message_ptr + channels + channel_B, (var_B + mean_B * mean_B) * total, mask=is_inside_B)
    tl.store(message_ptr + 2 * channels + channel_B, total, mask=channel_B == 0)


@triton.jit(do_not_specialize=["channels"])
def _unpack_kernel(  # type: ignore[no-untyped-def]
    message_ptr,
    statistics_ptr,
    count_parts_ptr,
    running_mean_ptr,
    running_var_ptr,
    channels,
    eps: tl.float64,
    decay: tl.float64,
    gain: tl.float64,
    HAS_RUNNING: tl.constexpr,
    COUNT_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside_B = channel_B < channels
    total = tl.load(message_ptr + 2 * channels)
    mean_B = tl.load(message_ptr + channel_B, mask=is_inside_B) / total
    second_B = tl.load(message_ptr + channels + channel_B, mask=is_inside_B) / total
    # Rounding can make a variance negative. A NaN fails the comparison and stays NaN, so that the step is skipped.
    var_B = second_B - mean_B * mean_B
    var_B = tl.where(var_B < 0, 0.0, var_B)
    unbiased_var_B = var_B * (total / (total - 1))
    tl.store(statistics_ptr + channel_B, mean_B, mask=is_inside_B)
    tl.store(statistics_ptr + channels + channel_B, 1 / tl.sqrt(var_B + eps), mask=is_inside_B)
    tl.store(statistics_ptr + 2 * channels + channel_B, unbiased_var_B, mask=is_inside_B)
    if HAS_RUNNING:
        running_mean_B = tl.load(running_mean_ptr + channel_B, mask=is_inside_B).to(tl.float64)
        running_var_B = tl.load(running_var_ptr + channel_B, mask=is_inside_B).to(tl.float64)
        tl.store(running_mean_ptr + channel_B, running_mean_B * decay + mean_B * gain, mask=is_inside_B)
        tl.store(running_var_ptr + channel_B, running_var_B * decay + unbiased_var_B * gain, mask=is_inside_B)
    if tl.program_id(0) == 0:
        part_P = tl.arange(0, COUNT_PARTS)
        tl.store(count_parts_ptr + part_P, ((part_P + total) / COUNT_PARTS).to(tl.int32))


def _programs(channels: int) -> int:
    return -(-channels // BLOCK)


def pack_moments(mean_C: Tensor, var_C: Tensor, count: int) -> Tensor:
    """See `messages.pack_moments`. The tensors are on the current device."""
    channels = mean_C.numel()
    message = mean_C.new_empty(2 * channels + 1, dtype=torch.float64)
    _pack_kernel[(_programs(channels),)](mean_C, var_C, message, channels, count, BLOCK=BLOCK)
    return message


def unpack_statistics(
    message: Tensor, dtype: torch.dtype, eps: float, running: RunningUpdate | None
) -> GroupStatistics:
    """See `messages.unpack_statistics`; does not change the message. The tensors are on the current device."""
    channels = message.numel() // 2
    statistics_3C = message.new_empty((3, channels), dtype=dtype)
    count_parts = message.new_empty(COUNT_PARTS, dtype=torch.int32)
    running_mean_C, running_var_C, decay, gain = running or (None, None, 0.0, 0.0)
    _unpack_kernel[(_programs(channels),)](
        message,
        statistics_3C,
        count_parts,
        running_mean_C,
        running_var_C,
        channels,
        eps,
        decay,
        gain,
        HAS_RUNNING=running is not None,
        COUNT_PARTS=COUNT_PARTS,
        BLOCK=BLOCK,
    )
    mean_C, inverse_std_C, unbiased_var_C = statistics_3C.unbind()
    return GroupStatistics(mean_C, inverse_std_C, unbiased_var_C, count_parts)

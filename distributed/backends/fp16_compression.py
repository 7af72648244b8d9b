"""fp16 gradient compression: each rank's share of the mean gradient, as it is sent."""

import torch
from torch import Tensor


def fp16_share(gradient: Tensor, world_size: int) -> Tensor:
    """Return `gradient / world_size` in fp16, in the same layout: the sum over ranks is the mean gradient.

    Divides in the gradient's own precision and rounds once, before the sum. So neither a gradient of up to
    65504 * world_size nor the sum of 1,536 gradients overflows while fp16 can hold the mean. (torch's own fp16 hook for DDP
    rounds first.) An overflow is an infinity on every rank, and the step is skipped.

    Shares below 6e-8 underflow to zero, which is 9e-5 of a gradient at 1,536 ranks. Loss scaling (numerics.amp=float16) keeps
    gradients above that; without it, use fp16 compression in small worlds only.
    """
    share = torch.empty_like(gradient, dtype=torch.float16)
    return torch.mul(gradient, 1.0 / world_size, out=share)

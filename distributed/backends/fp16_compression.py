"""Gradients as they travel in half precision."""

import torch
from torch import Tensor


def half_part(gradient: Tensor, size: int) -> Tensor:
    """A rank's part of the mean over `size` ranks, in fp16 and in the same layout: the sum of all parts is the mean.

    Divided in the gradient's own precision and rounded once, in front of the sum: with that, neither a gradient of up to
    65504 * size nor the sum of 1,536 of them overflows while the mean can be held (torch's own hook for DDP rounds first). An
    overflow is an infinity on every rank, and the step is rolled back.

    The other end: parts below 6e-8 vanish, which is 9e-5 of a gradient at 1,536 ranks. Loss scaling (numerics.amp=float16)
    lifts gradients out of there; without it a half-precision wire is for small worlds.
    """
    part = torch.empty_like(gradient, dtype=torch.float16)
    return torch.mul(gradient, 1.0 / size, out=part)

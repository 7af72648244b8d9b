"""Count the multiply-adds of a forward pass per clip."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from .networks import TemporalNetwork


def clip_multiply_adds(build: Callable[[], TemporalNetwork], size: int) -> int:
    """Return the multiply-adds of one clip of `size` x `size` pixels through the network that `build` makes.

    Papers on video networks call this FLOPs (33 G for TSM's ResNet-50 of 8 frames, arXiv:1811.08383, table 2). A multiplication
    with its addition counts once, so the result is half of torch's count. Convolutions and matrix products count; the shift,
    pooling and batch norms do not. Runs on the meta device, without computing values.
    """
    with torch.device("meta"):
        network = build().eval()
        x_NTCHW = torch.empty(1, network.num_frames, network.in_channels, size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x_NTCHW)
    return counter.get_total_flops() // 2

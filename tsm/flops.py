"""Count the multiply-adds of a forward pass per clip."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from .networks import TemporalNetwork


def clip_multiply_adds(build: Callable[[], TemporalNetwork], size: int) -> int:
    """Multiply-adds of one clip of `size` x `size` pixels through the network that `build` makes.

    This is what papers on video networks call FLOPs (33 G for TSM's ResNet-50 of 8 frames, arXiv:1811.08383, table 2): a
    multiplication and an addition count once, so it is half of what torch's counter says. Convolutions and matrix products
    count, the shift, pooling and batch norms do not. Nothing is computed: the network has shapes and no values.
    """
    with torch.device("meta"):
        network = build().eval()
        x_NTCHW = torch.empty(1, network.num_frames, 3, size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x_NTCHW)
    return counter.get_total_flops() // 2

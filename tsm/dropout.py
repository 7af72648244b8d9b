"""Dropout with masks per clip, independent of the process that trains it."""

import torch
from torch import Tensor, nn


class ClipDropout(nn.Module):
    """Dropout over per-frame features (N, T, C) whose mask is a pure function of a seed for each clip.

    The training step sets `seed_N` (int64, one per clip) before the forward pass. A clip then gets the same mask on any process,
    micro-batch or device, and a resumed run needs no saved generator state. Without `seed_N` masks come from torch's global
    generator, as in `nn.Dropout`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be in [0, 1), got {p}")
        self.p = p
        self.seed_N: Tensor | None = None

    def forward(self, x_NTC: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x_NTC
        if self.seed_N is None:
            return nn.functional.dropout(x_NTC, self.p, training=True)
        if len(self.seed_N) != len(x_NTC):
            raise ValueError(f"{len(self.seed_N)} dropout seeds were set for a batch of {len(x_NTC)} clips")
        keep_NTC = uniform_of(self.seed_N.to(x_NTC.device), x_NTC[0].numel()).view_as(x_NTC) >= self.p
        return x_NTC * keep_NTC / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def uniform_of(seed_N: Tensor, count: int) -> Tensor:
    """Return `count` float32 numbers in [0, 1) for each int64 seed, shape (N, count), the same on every device.

    They are the 32-bit finalizer of MurmurHash3 over (seed, position), in int64 arithmetic, which torch has on all devices.
    """
    position_M = torch.arange(count, device=seed_N.device)
    # Nested, because swapping the halves of a seed must give another key.
    key_N = _mixed(_mixed(seed_N & _LOW_32) ^ ((seed_N >> 32) & _LOW_32))
    word_NM = _mixed(key_N[:, None] ^ (position_M * 0x9E3779B1 & _LOW_32))
    return (word_NM >> 8).float() / (1 << 24)


_LOW_32 = 0xFFFFFFFF


def _mixed(word: Tensor) -> Tensor:
    word = (word ^ (word >> 16)) * 0x85EBCA6B & _LOW_32
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & _LOW_32
    return word ^ (word >> 16)

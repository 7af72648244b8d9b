"""The order of training clips: one endless stream, a new permutation of the manifest in each epoch.

A keyed bijection computes the clip at any position in O(1) memory, so 1,536 ranks share no list and a resume needs one
integer. Does not import torch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .counter_rng import key_of, mix_array

# 4 rounds make a Feistel network a pseudo-random permutation, given good round functions; 2 more for small domains.
_ROUNDS = 6


@dataclass(frozen=True)
class StreamOrder:
    """The stream of `num_rows` manifest rows for one seed: position p is in epoch `p // num_rows`.

    Step s of a run with global batch B takes the positions `[s * B, (s + 1) * B)`. No clip is dropped at the end of an epoch;
    a step may contain the end of one epoch and the start of the next.
    """

    num_rows: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ValueError(f"a stream needs at least 1 row, got {self.num_rows}")

    def at(self, position_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Compute `(epoch_N, row_N)` of stream positions, given in any order."""
        position_N = np.asarray(position_N, dtype=np.int64)
        epoch_N, index_N = np.divmod(position_N, self.num_rows)
        row_N = np.empty_like(index_N)
        for epoch in np.unique(epoch_N):
            here = epoch_N == epoch
            row_N[here] = permute(index_N[here], self.num_rows, key_of(self.seed, int(epoch)))
        return epoch_N, row_N


def permute(index_N: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Permute indices by a bijection of `[0, size)` that `key` selects: a Feistel network with cycle walking.

    The network permutes `[0, 4**h)`, the smallest such domain that contains `[0, size)`. An image outside `[0, size)` is
    permuted again, which keeps the map a bijection (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    image_N = _feistel(index_N.astype(np.uint64), half_bits, key)
    outside_N = image_N >= size
    while outside_N.any():
        image_N[outside_N] = _feistel(image_N[outside_N], half_bits, key)
        outside_N = image_N >= size
    return image_N.astype(np.int64)


def _feistel(word_N: NDArray[np.uint64], half_bits: int, key: int) -> NDArray[np.uint64]:
    bits, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left_N, right_N = word_N >> bits, word_N & low
    for round_number in range(_ROUNDS):
        round_key = np.uint64(key_of(key, round_number))
        left_N, right_N = right_N, left_N ^ (mix_array(right_N ^ round_key) & low)
    return (left_N << bits) | right_N


def evaluation_rows(
    num_rows: int, batch: int, rank: int, size: int
) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """List one rank's evaluation batches as `(row_N, real_N)`: `batch` rows each, the same number of batches on every rank.

    Each row is real exactly once over all ranks. Padding in the last batches has `real_N` False and must not be counted.
    """
    per_rank = -(-num_rows // size)
    batches = -(-per_rank // batch)
    slot = np.arange(batches * batch)
    # Neighbouring rows go to neighbouring ranks, so that the ranks' real rows differ by at most one.
    row = slot * size + rank
    real = row < num_rows
    row = np.where(real, row, rank % num_rows)
    return list(zip(row.reshape(batches, batch), real.reshape(batches, batch), strict=True))

"""Which clip stands where in training: one endless stream, a permutation of the manifest for each epoch.

A keyed bijection gives any position in O(1) memory, so 1,536 ranks need no shared list and resuming needs one integer.
Imports without torch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .counter_rng import key_of, mix_array

_ROUNDS = 6  # 4 make a Feistel network a pseudo-random permutation for good round functions; 2 more for small domains


@dataclass(frozen=True)
class StreamOrder:
    """The stream of `num_rows` manifest rows under `seed`: position p is in epoch `p // num_rows`.

    Step s of a run with a global batch of B takes the positions `[s * B, (s + 1) * B)`: nothing is dropped at an epoch's end
    and a step may hold the end of one epoch and the start of the next.
    """

    num_rows: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ValueError(f"a stream needs 1 row or more, got {self.num_rows}")

    def at(self, position_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`(epoch_N, row_N)` of stream positions, in any order."""
        position_N = np.asarray(position_N, dtype=np.int64)
        epoch_N, index_N = np.divmod(position_N, self.num_rows)
        row_N = np.empty_like(index_N)
        for epoch in np.unique(epoch_N):
            here = epoch_N == epoch
            row_N[here] = permute(index_N[here], self.num_rows, key_of(self.seed, int(epoch)))
        return epoch_N, row_N


def permute(index_N: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Images of indices under a bijection of `[0, size)` that `key` selects: a Feistel network with cycle walking.

    The network permutes `[0, 4**h)`, the smallest such power that holds `size`; an image outside `[0, size)` is fed in again,
    which keeps the map a bijection (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
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
    """This rank's batches of an evaluation: `(row_N, real_N)` each, all of `batch` rows and as many on every rank.

    Every row is real exactly once over all ranks; what fills the last batches up is marked and must never be counted.
    """
    per_rank = -(-num_rows // size)
    batches = -(-per_rank // batch)
    slot = np.arange(batches * batch)
    row = slot * size + rank  # neighbouring rows on neighbouring ranks: an uneven end differs by one row
    real = row < num_rows
    row = np.where(real, row, rank % num_rows)
    return list(zip(row.reshape(batches, batch), real.reshape(batches, batch), strict=True))

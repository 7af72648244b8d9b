"""A counter-based random number generator: a pure function of a key, with no state to checkpoint.

The bits are the same in every version of every library. The mixing function is the finalizer of splitmix64 (Steele et al.,
"Fast splittable pseudorandom number generators", 2014).
"""

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(word: int) -> int:
    """Mix a 64-bit word: a bijection that spreads every input bit over all output bits."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def key_of(*parts: int) -> int:
    """Hash any number of integers to a 64-bit key; the order of the parts matters."""
    key = 0
    for part in parts:
        key = mix((key + _GOLDEN + (part & _MASK)) & _MASK)
    return key


def words(key: int, count: int) -> NDArray[np.uint64]:
    """Generate the first `count` 64-bit words of the stream that `key` selects."""
    counter = np.arange(1, count + 1, dtype=np.uint64)
    return mix_array(np.uint64(key) + counter * np.uint64(_GOLDEN))


def uniforms(key: int, count: int) -> NDArray[np.float64]:
    """Generate the first `count` doubles in [0, 1), multiples of 2**-53, of the stream that `key` selects."""
    return (words(key, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix_array(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply `mix` to an array; unsigned NumPy arithmetic wraps around."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))

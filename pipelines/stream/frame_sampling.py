"""Which frames of a clip the network sees: the official TSM's rules, index for index (ops/dataset.py), counted from 0.

Uniform: the clip is cut in as many equal segments as the network takes frames (Wang et al., TSN, arXiv:1608.00859). Dense:
frames at a fixed distance from a window of 64, as I3D takes them (Wang et al., Non-local networks, arXiv:1711.07971).
`num_frames` is the clip's length, `segments` the number of frames taken.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

DENSE_WINDOW = 64
_DENSE_TEST_CLIPS = 10

# --- Training: draw_T holds a uniform number in [0, 1) for each frame ---------------------------------------------------


def uniform_training(num_frames: int, segments: int, draw_T: NDArray[np.float64]) -> NDArray[np.int64]:
    """One random frame from each of `segments` parts of `num_frames // segments` frames.

    A clip with fewer frames than segments gives frame 0 throughout.
    """
    length = num_frames // segments
    if length == 0:
        return np.zeros(segments, dtype=np.int64)
    return np.arange(segments) * length + np.floor(draw_T * length).astype(np.int64)


def dense_training(num_frames: int, segments: int, draw_T: NDArray[np.float64]) -> NDArray[np.int64]:
    """Frames of a window that begins at random, by the first number of `draw_T`.

    As in the official code the last possible start is never drawn, unless it is the only one.
    """
    starts = max(1, _dense_starts(num_frames) - 1)
    return _dense_window(num_frames, segments, int(draw_T[0] * starts))


TRAINING_RULES: dict[str, Callable[[int, int, NDArray[np.float64]], NDArray[np.int64]]] = {
    "uniform": uniform_training,
    "dense": dense_training,
}

# --- Evaluation: frame_VT, one row of frames for each temporal view -----------------------------------------------------


def uniform_validation(num_frames: int, segments: int) -> NDArray[np.int64]:
    """The middle frame of each segment, (1, T): how the official code validates while it trains.

    A clip of `segments` frames or fewer gives frame 0 throughout, in which it differs from `uniform_test`.
    """
    if num_frames <= segments:
        return np.zeros((1, segments), dtype=np.int64)
    return uniform_test(num_frames, segments)


def dense_validation(num_frames: int, segments: int) -> NDArray[np.int64]:
    """The window in the middle, (1, T); the official code draws one anew each time, which makes two validations differ."""
    return _dense_window(num_frames, segments, (_dense_starts(num_frames) - 1) // 2)[None]


def uniform_test(num_frames: int, segments: int) -> NDArray[np.int64]:
    """The middle frame of each segment, (1, T)."""
    length = num_frames / segments
    return (length / 2 + length * np.arange(segments)).astype(np.int64)[None]


def twice_test(num_frames: int, segments: int) -> NDArray[np.int64]:
    """The middle frames and the first frames of the segments, (2, T)."""
    first_T = (num_frames / segments * np.arange(segments)).astype(np.int64)
    return np.concatenate([uniform_test(num_frames, segments), first_T[None]])


def dense_test(num_frames: int, segments: int) -> NDArray[np.int64]:
    """Ten windows, evenly over the clip, (10, T); ten times the same where the clip is no longer than a window.

    The official `linspace`, cut to whole numbers, gives these starts (compared for up to 200,000 of them).
    """
    last = _dense_starts(num_frames) - 1
    starts = [clip * last // (_DENSE_TEST_CLIPS - 1) for clip in range(_DENSE_TEST_CLIPS)]
    return np.stack([_dense_window(num_frames, segments, start) for start in starts])


EVALUATION_RULES: dict[str, Callable[[int, int], NDArray[np.int64]]] = {
    "uniform_validation": uniform_validation,
    "dense_validation": dense_validation,
    "uniform": uniform_test,
    "twice": twice_test,
    "dense": dense_test,
}


def _dense_starts(num_frames: int) -> int:
    """In how many places a window fits; a shorter clip has one, and its frames are repeated from the front."""
    return max(1, 1 + num_frames - DENSE_WINDOW)


def _dense_window(num_frames: int, segments: int, start: int) -> NDArray[np.int64]:
    return (start + np.arange(segments) * (DENSE_WINDOW // segments)) % num_frames

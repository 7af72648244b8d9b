"""Frame sampling: the official TSM's rules (its ops/dataset.py), index for index, with frames counted from 0.

Uniform: divide the clip into equal segments and take one frame per segment (Wang et al., TSN, arXiv:1608.00859). Dense: take
frames at a fixed stride from a window of 64, as I3D does (Wang et al., Non-local networks, arXiv:1711.07971). `num_frames` is
the clip's length, `segments` the number of frames to take.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

DENSE_WINDOW = 64
_DENSE_TEST_CLIPS = 10

# --- Training: uniform_T holds one random number in [0, 1) per frame -----------------------------------------------------


def uniform_training(num_frames: int, segments: int, uniform_T: NDArray[np.float64]) -> NDArray[np.int64]:
    """Take one random frame from each of `segments` segments of `num_frames // segments` frames.

    A clip with fewer frames than segments gives only frame 0.
    """
    length = num_frames // segments
    if length == 0:
        return np.zeros(segments, dtype=np.int64)
    return np.arange(segments) * length + np.floor(uniform_T * length).astype(np.int64)


def dense_training(num_frames: int, segments: int, uniform_T: NDArray[np.float64]) -> NDArray[np.int64]:
    """Take the frames of a window with a random start; uses only the first number of `uniform_T`.

    As in the official code, the last possible start is never sampled unless it is the only one.
    """
    starts = max(1, _dense_starts(num_frames) - 1)
    return _dense_window(num_frames, segments, int(uniform_T[0] * starts))


TRAINING_RULES: dict[str, Callable[[int, int, NDArray[np.float64]], NDArray[np.int64]]] = {
    "uniform": uniform_training,
    "dense": dense_training,
}

# --- Evaluation: frame_VT, one row of frames per temporal view -----------------------------------------------------------


def uniform_validation(num_frames: int, segments: int) -> NDArray[np.int64]:
    """Take the middle frame of each segment, (1, T), as the official code does for validation during training.

    Unlike `uniform_test`, a clip of `segments` frames or fewer gives only frame 0.
    """
    if num_frames <= segments:
        return np.zeros((1, segments), dtype=np.int64)
    return uniform_test(num_frames, segments)


def dense_validation(num_frames: int, segments: int) -> NDArray[np.int64]:
    """Take the middle window, (1, T). The official code samples a random window, so its validations are not repeatable."""
    return _dense_window(num_frames, segments, (_dense_starts(num_frames) - 1) // 2)[None]


def uniform_test(num_frames: int, segments: int) -> NDArray[np.int64]:
    """Take the middle frame of each segment, (1, T)."""
    length = num_frames / segments
    return (length / 2 + length * np.arange(segments)).astype(np.int64)[None]


def twice_test(num_frames: int, segments: int) -> NDArray[np.int64]:
    """Take the middle frames and the first frames of the segments, (2, T)."""
    first_T = (num_frames / segments * np.arange(segments)).astype(np.int64)
    return np.concatenate([uniform_test(num_frames, segments), first_T[None]])


def dense_test(num_frames: int, segments: int) -> NDArray[np.int64]:
    """Take ten windows spread evenly over the clip, (10, T); all ten are equal if the clip is no longer than a window.

    The starts equal the official code's truncated `linspace` (compared for up to 200,000 starts).
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
    """Count the possible window starts. A clip shorter than the window has one, and its frames repeat from frame 0."""
    return max(1, 1 + num_frames - DENSE_WINDOW)


def _dense_window(num_frames: int, segments: int, start: int) -> NDArray[np.int64]:
    return (start + np.arange(segments) * (DENSE_WINDOW // segments)) % num_frames

"""Frame sampling: the official TSM's rules (its ops/dataset.py), index for index, with frames counted from 0.

Uniform: divide the clip into equal segments and take one frame per segment (Wang et al., TSN, arXiv:1608.00859). Dense: take
frames at a fixed stride from a window of 64, as I3D does (Wang et al., Non-local networks, arXiv:1711.07971). `num_frames` is
the clip's length, `segments` the number of frames to take.

Each rule gives the first frame of every segment, and `with_following` the `length` frames of each (L: 1 for RGB, 5 for optical
flow, modality.py). The uniform rules sample only first frames that L - 1 others follow, where the clip is long enough.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

DENSE_WINDOW = 64
_DENSE_TEST_CLIPS = 10


def with_following(first_VT: NDArray[np.int64], num_frames: int, length: int) -> NDArray[np.int64]:
    """Take `length` consecutive frames from each first frame on, (..., T * length); the clip's last frame repeats at its end."""
    frame_VTL = np.minimum(first_VT[..., None] + np.arange(length), num_frames - 1)
    return frame_VTL.reshape(*first_VT.shape[:-1], -1)


# --- Training: uniform_T holds one random number in [0, 1) per segment ---------------------------------------------------


def uniform_training(
    num_frames: int, segments: int, uniform_T: NDArray[np.float64], length: int = 1
) -> NDArray[np.int64]:
    """Take one random frame from each of `segments` segments of `d = (num_frames - length + 1) // segments` frames.

    With d = 0, which RGB (`length` 1) has only in clips of fewer frames than segments, a clip of more frames than segments gives
    sorted random frames, and any other only frame 0. The official code fails on a clip of fewer than `length` frames that has
    more frames than segments; here it gives frame 0.
    """
    starts = num_frames - length + 1
    distance = starts // segments
    if distance > 0:
        return np.arange(segments) * distance + np.floor(uniform_T * distance).astype(np.int64)
    if num_frames > segments and starts > 0:
        return np.sort(np.floor(uniform_T * starts).astype(np.int64))
    return np.zeros(segments, dtype=np.int64)


def dense_training(
    num_frames: int, segments: int, uniform_T: NDArray[np.float64], length: int = 1
) -> NDArray[np.int64]:
    """Take the frames of a window with a random start; uses only the first number of `uniform_T`.

    As in the official code, the last possible start is never sampled unless it is the only one, and `length` does not matter.
    """
    starts = max(1, _dense_starts(num_frames) - 1)
    return _dense_window(num_frames, segments, int(uniform_T[0] * starts))


TRAINING_RULES: dict[str, Callable[..., NDArray[np.int64]]] = {
    "uniform": uniform_training,
    "dense": dense_training,
}

# --- Evaluation: frame_VT, one row of frames per temporal view -----------------------------------------------------------


def uniform_validation(num_frames: int, segments: int, length: int = 1) -> NDArray[np.int64]:
    """Take the middle frame of each segment, (1, T), as the official code does for validation during training.

    Unlike `uniform_test`, a clip of `segments + length - 1` frames or fewer gives only frame 0.
    """
    if num_frames <= segments + length - 1:
        return np.zeros((1, segments), dtype=np.int64)
    return uniform_test(num_frames, segments, length)


def dense_validation(num_frames: int, segments: int, length: int = 1) -> NDArray[np.int64]:
    """Take the middle window, (1, T). The official code samples a random window, so its validations are not repeatable."""
    return _dense_window(num_frames, segments, (_dense_starts(num_frames) - 1) // 2)[None]


def uniform_test(num_frames: int, segments: int, length: int = 1) -> NDArray[np.int64]:
    """Take the middle frame of each segment, (1, T)."""
    distance = _test_distance(num_frames, segments, length)
    return (distance / 2 + distance * np.arange(segments)).astype(np.int64)[None]


def twice_test(num_frames: int, segments: int, length: int = 1) -> NDArray[np.int64]:
    """Take the middle frames and the first frames of the segments, (2, T)."""
    first_T = (_test_distance(num_frames, segments, length) * np.arange(segments)).astype(np.int64)
    return np.concatenate([uniform_test(num_frames, segments, length), first_T[None]])


def dense_test(num_frames: int, segments: int, length: int = 1) -> NDArray[np.int64]:
    """Take ten windows spread evenly over the clip, (10, T); all ten are equal if the clip is no longer than a window.

    The starts equal the official code's truncated `linspace` (compared for up to 200,000 starts).
    """
    last = _dense_starts(num_frames) - 1
    starts = [clip * last // (_DENSE_TEST_CLIPS - 1) for clip in range(_DENSE_TEST_CLIPS)]
    return np.stack([_dense_window(num_frames, segments, start) for start in starts])


EVALUATION_RULES: dict[str, Callable[..., NDArray[np.int64]]] = {
    "uniform_validation": uniform_validation,
    "dense_validation": dense_validation,
    "uniform": uniform_test,
    "twice": twice_test,
    "dense": dense_test,
}


def _test_distance(num_frames: int, segments: int, length: int) -> float:
    """Return the frames between the first frames of two segments. A clip of fewer than `length` frames gives only frame 0: the
    official code looks for frames before its first."""
    return max(0, num_frames - length + 1) / segments


def _dense_starts(num_frames: int) -> int:
    """Count the possible window starts. A clip shorter than the window has one, and its frames repeat from frame 0."""
    return max(1, 1 + num_frames - DENSE_WINDOW)


def _dense_window(num_frames: int, segments: int, start: int) -> NDArray[np.int64]:
    return (start + np.arange(segments) * (DENSE_WINDOW // segments)) % num_frames

"""Which frames of a clip the network sees (TSM's uniform sampling; Wang et al., TSN, arXiv:1608.00859)."""

import numpy as np
from numpy.typing import NDArray


def uniform_training(num_frames: int, segments: int, draw_T: NDArray[np.float64]) -> NDArray[np.int64]:
    """One random frame from each of `segments` equal parts of a clip; `draw_T` holds a uniform number in [0, 1) for each.

    The official rule for one frame a segment: parts of `num_frames // segments` frames; a clip with fewer frames than
    segments gives frame 0 throughout.
    """
    length = num_frames // segments
    if length == 0:
        return np.zeros(segments, dtype=np.int64)
    return np.arange(segments) * length + np.floor(draw_T * length).astype(np.int64)


def uniform_centre(num_frames: int, segments: int) -> NDArray[np.int64]:
    """The middle frame of each of `segments` parts, for evaluation; a clip of `segments` frames or fewer gives frame 0.

    The official rule takes frame 0 from a clip of exactly `segments` frames as well.
    """
    if num_frames <= segments:
        return np.zeros(segments, dtype=np.int64)
    length = num_frames / segments
    return (length / 2 + length * np.arange(segments)).astype(np.int64)

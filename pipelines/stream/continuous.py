"""The continuous stream of an evaluation: clips one after another, as a camera that never stops shows them.

The clips of a manifest form a circle in a fixed pseudo-random order, so what precedes a clip is part of the protocol. Several
streams may share the circle: a past-only network remembers as many frames as it has shifts, so a stream that starts that many
frames earlier gives the answers of one that has gone round forever.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .counter_rng import key_of
from .frame_sampling import dense_validation, uniform_test
from .order import permute

BEGINNINGS_PERCENT = tuple(range(10, 101, 10))
"""Parts of a clip after which early recognition is measured."""

# Changing it changes what precedes each clip, and so every score of the protocol.
_ORDER_KEY = key_of(0x57AE)


@dataclass(frozen=True)
class Lane:
    """Consecutive clips of the circle that one stream shows. The first `burn_in` clips only fill its caches."""

    row_C: NDArray[np.int64]
    burn_in: int


def circle(num_rows: int) -> NDArray[np.int64]:
    """Return all rows in the order of the circle: the same for every seed, and the last is followed by the first."""
    return permute(np.arange(num_rows), num_rows, _ORDER_KEY)


def lanes_of(num_frames_N: NDArray[np.int64], count: int, distance: int, burn_in_frames: int) -> list[Lane]:
    """Divide the circle into at most `count` lanes, which count each clip once.

    Each lane begins with so many clips before its own that every `distance`-th frame of them is `burn_in_frames` or more.
    """
    row_N = circle(len(num_frames_N))
    count = min(count, len(row_N))
    bounds = np.arange(count + 1) * len(row_N) // count
    shown_N = -(-num_frames_N[row_N] // distance)
    lanes = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        burn_in = frames = 0
        while frames < burn_in_frames:
            burn_in += 1
            frames += int(shown_N[(start - burn_in) % len(row_N)])
        lanes.append(Lane(row_N[np.arange(start - burn_in, end) % len(row_N)], burn_in))
    return lanes


@dataclass(frozen=True)
class Shown:
    """A clip that a lane shows next; `counted`: it is no burn-in."""

    lane: int
    row: int
    counted: bool


def rounds_of(lanes: Sequence[Lane]) -> list[list[Shown]]:
    """List the clips in the order in which they are shown: in each round one clip of every lane that has one left."""
    longest = max((len(lane.row_C) for lane in lanes), default=0)
    return [
        [
            Shown(number, int(lane.row_C[at]), at >= lane.burn_in)
            for number, lane in enumerate(lanes)
            if at < len(lane.row_C)
        ]
        for at in range(longest)
    ]


def frames_seen(num_frames: int, percent: int) -> int:
    """Count the frames in the first `percent` of a clip, rounded up."""
    return -(-num_frames * percent // 100)


def whole_clip(num_frames: int, segments: int) -> NDArray[np.int64]:
    """Take every frame, (1, num_frames); a stream needs no number of segments."""
    return np.arange(num_frames)[None]


def _in_beginnings(rule: Callable[[int, int], NDArray[np.int64]]) -> Callable[[int, int], NDArray[np.int64]]:
    """Return the rule that takes the frames of `rule` from the first 10, 20, ... 100% of a clip, (10, T)."""

    def frames(num_frames: int, segments: int) -> NDArray[np.int64]:
        return np.concatenate([rule(frames_seen(num_frames, percent), segments) for percent in BEGINNINGS_PERCENT])

    return frames


CONTINUOUS_RULES: dict[str, Callable[[int, int], NDArray[np.int64]]] = {
    "stream": whole_clip,
    "uniform_beginnings": _in_beginnings(uniform_test),
    "dense_beginnings": _in_beginnings(dense_validation),
}
"""Frames that a stream and the curves of early recognition need. Ours: the official code has neither."""

"""Sample a training clip's augmentation before it is decoded: frames, crop and flip, a pure function of (seed, epoch, row).

All loaders apply the same sample parameters. Loaders are therefore interchangeable, and a resumed run sees the same pixels as
a run that never stopped. The views of an evaluation are in pipelines/stream/eval_views.py.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .burn_in import StreamSampling, other_row, stream_training
from .counter_rng import key_of, uniforms
from .frame_sampling import TRAINING_RULES, with_following
from .modality import FRAMES_PER_SEGMENT, RGB

# Tags that keep the random numbers of different purposes apart.
_SAMPLE, _REPLACEMENT, _DROPOUT, _STREAM, _BURN_IN = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training clips; part of the recipe.

    `sampling`: uniform or dense (frame_sampling.py), or stream, which needs `stream` (burn_in.py). `crop_scales`: sides of the
    random crop as fractions of the frame's shorter side; width and height may use neighbouring entries, as in TSN's
    multi-scale crop. `flip`: off, on (mirror half of the clips) or relabel (mirror half, and give a mirrored clip the class
    whose name has the `mirrored_words` exchanged: mirror_labels.py). `num_frames`: the segments of a clip, of which RGB gives
    one frame each and optical flow several flow fields (modality.py). Flow cannot be combined with `stream`.
    """

    num_frames: int
    size: int
    sampling: str = "uniform"
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    flip: str = "off"
    mirrored_words: tuple[tuple[str, str], ...] = ()
    stream: StreamSampling | None = None
    modality: str = RGB

    @property
    def burn_in(self) -> int:
        """Number of frames of another clip before each training clip."""
        return self.stream.burn_in if self.stream else 0

    @property
    def sample_frames(self) -> int:
        """Number of frames of a training sample: the clip's and the burn-in's."""
        return self.burn_in + self.num_frames


@dataclass(frozen=True)
class SampleParams:
    """One view of a clip: frame indices, a crop rectangle in pixels, and whether to mirror.

    `frame_T`: of optical flow all flow fields, one segment's after another's.
    `scaled`: (width, height) to scale the upright frames to before the crop; the rectangle is then in pixels of the scaled
    frame. None: crop the unscaled frames.
    """

    frame_T: NDArray[np.int64]
    left: int
    top: int
    width: int
    height: int
    flip: bool
    scaled: tuple[int, int] | None = None


def sample_training_params(
    augmentation: Augmentation, num_frames: int, width: int, height: int, seed: int, epoch: int, row: int
) -> SampleParams:
    """Sample the augmentation of one training clip; `width` and `height` are those of the upright frame."""
    segments = augmentation.num_frames
    uniform = uniforms(key_of(_SAMPLE, seed, epoch, row), segments + 3)
    if augmentation.stream is None:
        length = FRAMES_PER_SEGMENT[augmentation.modality]
        first_T = TRAINING_RULES[augmentation.sampling](num_frames, segments, uniform[:segments], length)
        frame_T = with_following(first_T, num_frames, length)
    else:
        distance, phase = uniforms(key_of(_STREAM, seed, epoch, row), 2)
        frame_T = stream_training(num_frames, segments, augmentation.stream.distance(distance), phase)
    return _cropped(augmentation, frame_T, width, height, uniform[segments:])


def burn_in_row(num_rows: int, seed: int, epoch: int, row: int) -> int:
    """Choose the clip whose frames precede the training clip of `row`."""
    return other_row(num_rows, row, uniforms(key_of(_BURN_IN, seed, epoch, row), 1)[0])


def sample_burn_in_params(
    augmentation: Augmentation, num_frames: int, width: int, height: int, seed: int, epoch: int, row: int, other: int
) -> SampleParams:
    """Sample the frames and the crop of row `other` that precede the training clip of `row`.

    The frame distance is the training clip's, because a camera does not change it.
    """
    assert augmentation.stream is not None
    distance = augmentation.stream.distance(uniforms(key_of(_STREAM, seed, epoch, row), 1)[0])
    uniform = uniforms(key_of(_BURN_IN, seed, epoch, row, other), 4)
    frame_T = stream_training(num_frames, augmentation.burn_in, distance, uniform[0])
    return _cropped(augmentation, frame_T, width, height, uniform[1:])


def _cropped(
    augmentation: Augmentation, frame_T: NDArray[np.int64], width: int, height: int, uniform: NDArray[np.float64]
) -> SampleParams:
    """Choose crop size, crop position and flip by three random numbers."""
    crops = _crop_sizes(min(width, height), augmentation.size, augmentation.crop_scales)
    crop_width, crop_height = crops[int(uniform[0] * len(crops))]
    offsets = crop_offsets(width - crop_width, height - crop_height)
    left, top = offsets[int(uniform[1] * len(offsets))]
    flip = augmentation.flip != "off" and bool(uniform[2] < 0.5)
    return SampleParams(frame_T, left, top, crop_width, crop_height, flip)


def replacement_row(num_rows: int, seed: int, epoch: int, row: int, attempt: int) -> int:
    """Choose the row that replaces an undecodable training clip: the same on every rank and after a resume."""
    return key_of(_REPLACEMENT, seed, epoch, row, attempt) % num_rows


def dropout_seeds(seed: int, step: int, slot_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Compute a 63-bit dropout seed per slot of a step's global batch, independent of the rank that holds the slot."""
    return np.array([key_of(_DROPOUT, seed, step, int(slot)) >> 1 for slot in slot_N], dtype=np.int64)


def _crop_sizes(base: int, target: int, scales: tuple[float, ...]) -> list[tuple[int, int]]:
    """List the (width, height) pairs of TSN's multi-scale crop: the two sides are at most one entry of `scales` apart.

    A side within 3 pixels of the network's input size is set to that size, so that the crop needs no resampling.
    """
    sides = [max(1, int(base * scale)) for scale in scales]
    sides = [min(target, base) if abs(side - target) < 3 else side for side in sides]
    return [(width, height) for i, height in enumerate(sides) for j, width in enumerate(sides) if abs(i - j) <= 1]


def crop_offsets(free_x: int, free_y: int) -> list[tuple[int, int]]:
    """List the 13 fixed (left, top) offsets of TSN's multi-scale crop, in quarters of the free space.

    The first five are the corners and the centre.
    """
    x, y = free_x // 4, free_y // 4
    corners_and_centre = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2)]
    edges_and_quarters = [(0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
    return [(i * x, j * y) for i, j in corners_and_centre + edges_and_quarters]

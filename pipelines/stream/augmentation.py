"""What training draws for a clip before it is decoded: frames, crop and flip as a pure function of (seed, epoch, row).

Every loader applies the same draw, so that they can be exchanged and a resumed run sees what it would have seen. What an
evaluation looks at is decided in pipelines/stream/eval_views.py.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .counter_rng import key_of, uniforms
from .frame_sampling import TRAINING_RULES

# Streams that must not share random numbers get different tags in their keys.
_DRAW, _REPLACEMENT, _DROPOUT = 1, 2, 3


@dataclass(frozen=True)
class Augmentation:
    """What training does to a clip; part of the recipe.

    `sampling`: uniform or dense. `crop_scales`: sides of the random crop as parts of the shorter side; two neighbours in the
    list may be mixed, as in TSN's multi-scale crop. `flip`: off, on (half of the clips are mirrored) or relabel (likewise,
    and a mirrored clip's label is that of the class whose name has the `mirrored_words` exchanged: mirror_labels.py).
    """

    num_frames: int
    size: int
    sampling: str = "uniform"
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    flip: str = "off"
    mirrored_words: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Draw:
    """A view of a clip: frame indices, a crop rectangle in whole pixels, and whether to mirror.

    `scaled`: (width, height) that whole upright frames are scaled to before the crop, whose pixels then count from the scaled
    frame; None: the crop is cut from the frames as they are.
    """

    frame_T: NDArray[np.int64]
    left: int
    top: int
    width: int
    height: int
    flip: bool
    scaled: tuple[int, int] | None = None


def training_draw(
    augmentation: Augmentation, num_frames: int, width: int, height: int, seed: int, epoch: int, row: int
) -> Draw:
    """The random draw of a training clip; `width` and `height` are those of the upright frame."""
    segments = augmentation.num_frames
    number = uniforms(key_of(_DRAW, seed, epoch, row), segments + 3)
    frame_T = TRAINING_RULES[augmentation.sampling](num_frames, segments, number[:segments])
    crops = _crop_sizes(min(width, height), augmentation.size, augmentation.crop_scales)
    crop_width, crop_height = crops[int(number[segments] * len(crops))]
    offsets = crop_offsets(width - crop_width, height - crop_height)
    left, top = offsets[int(number[segments + 1] * len(offsets))]
    flip = augmentation.flip != "off" and bool(number[segments + 2] < 0.5)
    return Draw(frame_T, left, top, crop_width, crop_height, flip)


def replacement_row(num_rows: int, seed: int, epoch: int, row: int, attempt: int) -> int:
    """The row that stands in for an undecodable one in training: the same on every rank and in every repetition."""
    return key_of(_REPLACEMENT, seed, epoch, row, attempt) % num_rows


def dropout_seeds(seed: int, step: int, slot_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """A 63-bit seed for each slot of a step's global batch, whichever rank holds it."""
    return np.array([key_of(_DROPOUT, seed, step, int(slot)) >> 1 for slot in slot_N], dtype=np.int64)


def _crop_sizes(base: int, target: int, scales: tuple[float, ...]) -> list[tuple[int, int]]:
    """(width, height) pairs of TSN's multi-scale crop: at most one step of the list between the two sides.

    A side within 3 pixels of the network's input becomes that size, so that it need not be resampled.
    """
    sides = [max(1, int(base * scale)) for scale in scales]
    sides = [min(target, base) if abs(side - target) < 3 else side for side in sides]
    return [(width, height) for i, height in enumerate(sides) for j, width in enumerate(sides) if abs(i - j) <= 1]


def crop_offsets(free_x: int, free_y: int) -> list[tuple[int, int]]:
    """The 13 fixed (left, top) places of TSN's multi-scale crop, in quarters of the free space; the first five are the
    corners and the centre."""
    x, y = free_x // 4, free_y // 4
    corners_and_centre = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2)]
    edges_and_quarters = [(0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
    return [(i * x, j * y) for i, j in corners_and_centre + edges_and_quarters]

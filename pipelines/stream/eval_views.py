"""The views of a clip in an evaluation, whose outputs are averaged.

The rules are those of the official TSM code (its ops/transforms.py and test_models.py). Frames are scaled so that the shorter
side is 8/7 of the network's input size (256 for 224), then cropped.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .augmentation import SampleParams, crop_offsets
from .continuous import CONTINUOUS_RULES
from .frame_sampling import EVALUATION_RULES, with_following
from .modality import FLOW, FRAMES_PER_SEGMENT, RGB, channels_of

_RULES = EVALUATION_RULES | CONTINUOUS_RULES


@dataclass(frozen=True)
class EvalProtocol:
    """An evaluation protocol: temporal views (`clips`, a rule of frame_sampling.py or continuous.py) times spatial views (`crops`).

    `crops`: 1 (centre), 3 (left, right, centre), 5 (corners and centre) or 10 (the five and their mirror images).
    `full_resolution`: the crop's side is the scaled frame's shorter side, not the training size. `portrait_bug`: place three
    crops side by side in every clip, as the official code does; at full resolution a portrait clip then gets the same crop
    three times. False: place them along the longer side.
    """

    num_frames: int
    size: int
    clips: str = "uniform_validation"
    crops: int = 1
    full_resolution: bool = False
    portrait_bug: bool = False
    modality: str = RGB
    """`num_frames` counts segments, of which optical flow gives several flow fields each (modality.py)."""

    @property
    def channels(self) -> int:
        """Number of channels of the network's input."""
        return channels_of(self.modality)

    @property
    def side(self) -> int:
        """Height and width in pixels of the network's input."""
        return self._shorter_side if self.full_resolution else self.size

    @property
    def views(self) -> int:
        """Number of views per clip."""
        return len(_RULES[self.clips](1, self.num_frames)) * self.crops

    @property
    def mirrors(self) -> bool:
        """Tell whether every second view is the mirror image of the view before it."""
        return self.crops == 10

    @property
    def name(self) -> str:
        """Short name, unique per protocol and valid as a file name."""
        options = ["full"] * self.full_resolution + ["portrait_bug"] * (self.portrait_bug and self.crops == 3)
        modality = [FLOW] * (self.modality == FLOW)
        return "-".join([f"{self.num_frames}x{self.size}", *modality, self.clips, f"{self.crops}crop", *options])

    @property
    def _shorter_side(self) -> int:
        return self.size * 256 // 224

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """Compute the (width, height) to scale an upright frame to; rounds the longer side down, as torchvision does."""
        shorter = self._shorter_side
        if width <= height:
            return shorter, shorter * height // width
        return shorter * width // height, shorter


def evaluation_views(protocol: EvalProtocol, num_frames: int, width: int, height: int) -> list[SampleParams]:
    """List all views of a clip, grouped by temporal view; `width` and `height` are those of the upright frame."""
    scaled, side = protocol.scaled_size(width, height), protocol.side
    offsets = _offsets(protocol, scaled[0] - side, scaled[1] - side)
    flips = (False, True) if protocol.mirrors else (False,)
    return [
        SampleParams(frame_T, left, top, side, side, flip, scaled)
        for frame_T in _frames(protocol, num_frames)
        for left, top in offsets
        for flip in flips
    ]


def _frames(protocol: EvalProtocol, num_frames: int) -> NDArray[np.int64]:
    """List the frames of each temporal view, (V, T)."""
    if protocol.clips in CONTINUOUS_RULES:
        # For a stream of RGB frames; training/build/data.py refuses optical flow.
        return CONTINUOUS_RULES[protocol.clips](num_frames, protocol.num_frames)
    length = FRAMES_PER_SEGMENT[protocol.modality]
    first_VT = EVALUATION_RULES[protocol.clips](num_frames, protocol.num_frames, length)
    return with_following(first_VT, num_frames, length)


def _offsets(protocol: EvalProtocol, free_x: int, free_y: int) -> list[tuple[int, int]]:
    """List the (left, top) of each crop; `free_x` and `free_y` are scaled frame size minus crop size."""
    if protocol.crops == 1:
        # As torchvision's CenterCrop: round half to even.
        return [(round(free_x / 2), round(free_y / 2))]
    corners_and_centre = crop_offsets(free_x, free_y)[:5]
    if protocol.crops != 3:
        return corners_and_centre
    x, y = free_x // 4, free_y // 4
    if free_y > free_x and not protocol.portrait_bug:
        return [(2 * x, 0), (2 * x, 4 * y), (2 * x, 2 * y)]
    return [(0, 2 * y), (4 * x, 2 * y), (2 * x, 2 * y)]

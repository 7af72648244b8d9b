"""What an evaluation looks at: the views of a clip, whose answers are averaged.

The rules are the official TSM's (ops/transforms.py and test_models.py there). Frames are scaled so that the shorter side is
8/7 of the network's input (256 for 224); crops are cut from that.
"""

from dataclasses import dataclass

from .augmentation import Draw, crop_offsets
from .frame_sampling import EVALUATION_RULES


@dataclass(frozen=True)
class Protocol:
    """How clips are evaluated: temporal views (`clips`, a rule of frame_sampling.py) times spatial views (`crops`).

    `crops`: 1 (centre), 3 (left, right, centre), 5 (corners and centre) or 10 (these and their mirror images).
    `full_resolution`: the crop is as high as the scaled frame's shorter side, and the network takes it as it is. `portrait_bug`:
    three crops lie side by side in every clip, as the official code has it, so that at full resolution a clip that is higher
    than wide gets the same crop thrice; otherwise they follow the longer side.
    """

    num_frames: int
    size: int
    clips: str = "uniform_validation"
    crops: int = 1
    full_resolution: bool = False
    portrait_bug: bool = False

    @property
    def side(self) -> int:
        """Height and width in pixels of what the network sees."""
        return self._shorter_side if self.full_resolution else self.size

    @property
    def views(self) -> int:
        """Views of each clip."""
        return len(EVALUATION_RULES[self.clips](1, self.num_frames)) * self.crops

    @property
    def name(self) -> str:
        """Short, different for different protocols, and fit for a file's name."""
        options = ["full"] * self.full_resolution + ["portrait_bug"] * (self.portrait_bug and self.crops == 3)
        return "-".join([f"{self.num_frames}x{self.size}", self.clips, f"{self.crops}crop", *options])

    @property
    def _shorter_side(self) -> int:
        return self.size * 256 // 224

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that an upright frame is scaled to, by torchvision's rule: the longer side is rounded down."""
        shorter = self._shorter_side
        if width <= height:
            return shorter, shorter * height // width
        return shorter * width // height, shorter


def evaluation_views(protocol: Protocol, num_frames: int, width: int, height: int) -> list[Draw]:
    """All views of a clip, temporal view by temporal view; `width` and `height` are those of the upright frame."""
    scaled, side = protocol.scaled_size(width, height), protocol.side
    offsets = _offsets(protocol, scaled[0] - side, scaled[1] - side)
    flips = (False, True) if protocol.crops == 10 else (False,)
    return [
        Draw(frame_T, left, top, side, side, flip, scaled)
        for frame_T in EVALUATION_RULES[protocol.clips](num_frames, protocol.num_frames)
        for left, top in offsets
        for flip in flips
    ]


def _offsets(protocol: Protocol, free_x: int, free_y: int) -> list[tuple[int, int]]:
    """(left, top) of each crop, given the pixels that the scaled frame has more than the crop."""
    if protocol.crops == 1:  # torchvision's CenterCrop: halves are rounded to even
        return [(round(free_x / 2), round(free_y / 2))]
    corners_and_centre = crop_offsets(free_x, free_y)[:5]
    if protocol.crops != 3:
        return corners_and_centre
    x, y = free_x // 4, free_y // 4
    if free_y > free_x and not protocol.portrait_bug:
        return [(2 * x, 0), (2 * x, 4 * y), (2 * x, 2 * y)]
    return [(0, 2 * y), (4 * x, 2 * y), (2 * x, 2 * y)]

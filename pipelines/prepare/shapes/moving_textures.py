"""Small clips whose classes differ by motion only, for optical flow and two streams: drawing.

A textured disc lies on a textured background. Eight classes in four pairs, one pair for each part of the disc's pose:

    move_right / move_left, move_down / move_up, zoom_in / zoom_out, rotate_clockwise / rotate_counterclockwise

The class says which part of the pose changes, and in which direction. The part that changes runs evenly over its whole range; each
other part stays at a random place of its range. So at a random time the pose has the same distribution in every class. Colours
and textures are random too, and have the same distribution in every class: a single frame says nothing of the class. As in
drawing.py clips 2j and 2j+1 are twins, one drawing played forward and backward, and their encoded frames are equal.

The camera shakes: each frame is shifted by some pixels, about as far as the disc moves between two frames. A flow field of 8 bits
shows a zoom weakly and a move well. On RGB a network has to find the disc, which has a random saturated colour before a grey
background. A disc with colours like the background's is too hard for a small network in a few epochs.

Shapes in names: T frames, H height, W width, C colour, G cells of a grid.
"""

import colorsys

import numpy as np

from .drawing import SPLITS, Array

PAIRS = (
    ("move_right", "move_left"),
    ("move_down", "move_up"),
    ("zoom_in", "zoom_out"),
    ("rotate_clockwise", "rotate_counterclockwise"),
)
CLASSES = [name for pair in PAIRS for name in pair]
ORDER_GROUPS = [group for group, _ in enumerate(PAIRS) for _ in range(2)]
"""Number of each class's pair."""

# Half of the range of each part of the pose: x and y in units of the frame's side, log of the radius, angle in radians.
RANGES = (0.2, 0.2, 0.35, 0.9)
RADIUS = 0.2
"""The disc's radius in the middle of its range, in units of the frame's side."""
SHAKE_PX = 0.8
"""Standard deviation of the camera's place in each frame, in each direction. At most twice as far."""


def draw_clip(split: str, seed: int, index: int, size: int = 64, frames: tuple[int, ...] = (24, 40)) -> Array:
    """Draw video_THWC, uint8 RGB. An odd index gives the clip before it, played backward."""
    drawing, backward = divmod(index, 2)
    # The last word keeps these clips' random numbers apart from those of the shapes.
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([SPLITS[split], seed, drawing, 1])))
    video_THWC = _draw(rng, drawing % len(PAIRS), size, int(rng.choice(frames)))
    return np.ascontiguousarray(video_THWC[::-1]) if backward else video_THWC


def sample_poses(rng: np.random.Generator, changing: int, num_frames: int) -> list[Array]:
    """Sample x_T, y_T, log_radius_T and angle_T. Part `changing` runs through its range, the others keep a place in theirs."""
    # Times in the middle of equal intervals, so that these places are as evenly spread as the random ones.
    places_T = (np.arange(num_frames) + 0.5) / num_frames * 2.0 - 1.0
    middles = (*rng.uniform(0.4, 0.6, size=2), np.log(RADIUS), rng.uniform(0.0, 2.0 * np.pi))
    return [
        middle + half * (places_T if part == changing else np.full(num_frames, rng.uniform(-1.0, 1.0)))
        for part, (middle, half) in enumerate(zip(middles, RANGES, strict=True))
    ]


def _draw(rng: np.random.Generator, changing: int, size: int, num_frames: int) -> Array:
    poses = sample_poses(rng, changing, num_frames)
    x_T11, y_T11, log_radius_T11, angle_T11 = (part_T[:, None, None] for part_T in poses)
    radius_T11 = np.exp(log_radius_T11)
    shake_2T11 = np.clip(rng.normal(0.0, SHAKE_PX, (2, num_frames, 1, 1)), -2 * SHAKE_PX, 2 * SHAKE_PX) / size
    y_HW, x_HW = (np.mgrid[:size, :size] + 0.5) / size
    x_THW, y_THW = x_HW + shake_2T11[0], y_HW + shake_2T11[1]

    grey = np.full(3, rng.uniform(0.25, 0.6))
    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(0.0, 1.0), rng.uniform(0.5, 0.9), rng.uniform(0.6, 0.9)))
    # Cells of about four pixels at the default size, on the disc and on the background.
    background_THWC = _sample(_texture(rng, 18, grey), x_THW, y_THW, low=-0.06, high=1.06)
    from_x_THW, from_y_THW = (x_THW - x_T11) / radius_T11, (y_THW - y_T11) / radius_T11
    cos_T11, sin_T11 = np.cos(angle_T11), np.sin(angle_T11)
    own_x_THW = from_x_THW * cos_T11 + from_y_THW * sin_T11
    own_y_THW = from_y_THW * cos_T11 - from_x_THW * sin_T11
    disc_THWC = _sample(_texture(rng, 8, colour), own_x_THW, own_y_THW, low=-1.1, high=1.1)
    distance_THW = (np.hypot(from_x_THW, from_y_THW) - 1.0) * radius_T11 * size
    cover_THW1 = np.clip(0.5 - distance_THW, 0.0, 1.0).astype(np.float32)[..., None]

    video_THWC = rng.standard_normal((num_frames, size, size, 3), dtype=np.float32)
    video_THWC *= np.float32(rng.uniform(0.005, 0.02))
    video_THWC += background_THWC + cover_THW1 * (disc_THWC - background_THWC)
    np.clip(video_THWC, 0.0, 1.0, out=video_THWC)
    video_THWC *= 255.0
    return np.rint(video_THWC, out=video_THWC).astype(np.uint8)


def _texture(rng: np.random.Generator, cells: int, colour: Array) -> Array:
    """Sample grid_GGC: a colour, with random light and, less, random hues in each cell."""
    light = rng.uniform(0.10, 0.18) * rng.standard_normal((cells, cells, 1))
    return (colour + light + 0.04 * rng.standard_normal((cells, cells, 3))).astype(np.float32)


def _sample(grid_GGC: Array, x_THW: Array, y_THW: Array, low: float, high: float) -> Array:
    """Interpolate linearly in a grid that covers `low` to `high` in both directions, and continues with its border's values."""
    last = len(grid_GGC) - 1
    columns, rows = (np.clip((axis - low) / (high - low), 0.0, 1.0) * last for axis in (x_THW, y_THW))
    left, top = (np.minimum(axis.astype(int), last - 1) for axis in (columns, rows))
    right_part = (columns - left).astype(np.float32)[..., None]
    lower_part = (rows - top).astype(np.float32)[..., None]
    upper = grid_GGC[top, left] + right_part * (grid_GGC[top, left + 1] - grid_GGC[top, left])
    lower = grid_GGC[top + 1, left] + right_part * (grid_GGC[top + 1, left + 1] - grid_GGC[top + 1, left])
    return upper + lower_part * (lower - upper)

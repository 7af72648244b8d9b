"""Small clips of moving shapes that only a network with a sense of time can classify: drawing and encoding.

Ten classes in five pairs. The two classes of a pair differ only in the order of their frames:

    move_right / move_left, move_down / move_up, grow / shrink, rotate_clockwise / rotate_counterclockwise, appear / vanish

Clips 2j and 2j+1 are twins: one drawing, played forward and backward. A network that averages its answers over single frames
(TSN) gives both twins the same answer whenever it sees the same frames of both, and is right for at most one of them: its
ceiling is 50 %. To tell "fails on order" from "fails", nearly every frame gives the *pair* away: each pair has its own shape and
its own family of hues. The task measures only the sense of time.

Two things could reveal the order without motion, and are prevented:
- The encoder. A predicted frame depends on earlier frames, and the first frame of a GOP is the sharpest: "sharp and large"
  would mean shrink. Here each frame is encoded by itself (GOP of 1) with one fixed quantiser, so a decoded frame is a function
  of the drawn frame only: a twin's decoded video is the other's, reversed, bit for bit (test_shapes.py).
- The sampler. TSM's rule divides a clip into n equal segments of whole frames and leaves the remainder at the end unseen. Its
  centre frames are symmetric only when a segment has an odd number of frames. The default lengths, 24 and 40, are 8 x 3 and 8 x 5.

Each clip is a pure function of (split, seed, index) and of the data set's size and lengths; clip `index` has class `index % 10`.

Shapes in names: T frames, H height, W width, C colour.
"""

import colorsys
import io
from collections.abc import Callable
from dataclasses import dataclass

import av
import numpy as np

FPS = 24
QP = 22
"""The encoder's quantiser, the same for every frame."""
# The first word of each clip's seed, so that the splits share no clip.
SPLITS = {"train": 0, "val": 1}

Array = np.ndarray
Shape = Callable[[Array, Array], Array]
"""shape(x, y) is the signed distance to the outline in units of the shape's radius, negative inside; x points right, y down."""


def _box(x: Array, y: Array, cx: float, cy: float, half_w: float, half_h: float) -> Array:
    return np.maximum(np.abs(x - cx) - half_w, np.abs(y - cy) - half_h)


def _disc(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 1.0


def _square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.0, 0.0, 0.85, 0.85)


def _star(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.75 - 0.25 * np.cos(5.0 * np.arctan2(x, -y))


def _hand(x: Array, y: Array) -> Array:
    """A clock hand on its pivot. Only a full turn maps it onto itself, so its direction is never ambiguous."""
    return np.minimum(_box(x, y, 0.0, -0.3, 0.12, 0.4), np.hypot(x, y + 0.7) - 0.33)


def _cross(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.0, 0.0, 1.0, 0.3), _box(x, y, 0.0, 0.0, 0.3, 1.0))


@dataclass(frozen=True)
class Track:
    """The shape's pose in each frame: lengths in units of the frame's side, the angle in radians, clockwise on the screen."""

    x_T: Array
    y_T: Array
    radius_T: Array
    angle_T: Array
    opacity_T: Array


def _track(
    rng: np.random.Generator,
    progress_T: Array,
    x: tuple[float, float] | None = None,
    y: tuple[float, float] | None = None,
    radius: tuple[float, float] | None = None,
    angle: tuple[float, float] | None = None,
    opacity: tuple[float, float] = (1.0, 1.0),
) -> Track:
    """Move each value from the first of its pair to the second with `progress_T` (0 to 1); a value of None is constant."""

    def line(ends: tuple[float, float]) -> Array:
        return ends[0] + (ends[1] - ends[0]) * progress_T

    still_x, still_y, still_radius = rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.65), rng.uniform(0.11, 0.16)
    tilt = rng.uniform(-0.2, 0.2)
    return Track(
        x_T=line(x or (still_x, still_x)),
        y_T=line(y or (still_y, still_y)),
        radius_T=line(radius or (still_radius, still_radius)),
        angle_T=line(angle or (tilt, tilt)),
        opacity_T=np.clip(line(opacity), 0.0, 1.0),
    )


def _path(rng: np.random.Generator) -> tuple[float, float]:
    """Choose the ends of a move: far enough apart to be seen, far enough from the border to survive a crop."""
    span = rng.uniform(0.40, 0.62)
    start = rng.uniform(0.18, 0.82 - span)
    return start, start + span


def _move_x(rng: np.random.Generator, progress_T: Array) -> Track:
    return _track(rng, progress_T, x=_path(rng))


def _move_y(rng: np.random.Generator, progress_T: Array) -> Track:
    return _track(rng, progress_T, y=_path(rng))


def _grow(rng: np.random.Generator, progress_T: Array) -> Track:
    return _track(rng, progress_T, radius=(rng.uniform(0.08, 0.13), rng.uniform(0.24, 0.34)))


def _turn(rng: np.random.Generator, progress_T: Array) -> Track:
    """Turn over the upper half of the dial: a small network needs many more epochs to learn turns of the full circle."""
    radius = rng.uniform(0.28, 0.34)
    angle = np.deg2rad(rng.uniform(-120.0, -70.0)), np.deg2rad(rng.uniform(70.0, 120.0))
    return _track(rng, progress_T, radius=(radius, radius), angle=angle)


def _appear(rng: np.random.Generator, progress_T: Array) -> Track:
    radius = rng.uniform(0.17, 0.25)
    return _track(rng, progress_T, radius=(radius, radius), opacity=(rng.uniform(-0.15, 0.10), rng.uniform(0.90, 1.15)))


@dataclass(frozen=True)
class Pair:
    """Two classes with the same drawings, played forward and backward."""

    forward: str
    backward: str
    shape: Shape
    hue: float
    """The middle of the pair's family of hues, as a fraction of the colour circle."""
    track: Callable[[np.random.Generator, Array], Track]


PAIRS = (
    Pair("move_right", "move_left", _disc, 0.00, _move_x),
    Pair("move_down", "move_up", _square, 0.15, _move_y),
    Pair("grow", "shrink", _star, 0.36, _grow),
    Pair("rotate_clockwise", "rotate_counterclockwise", _hand, 0.56, _turn),
    Pair("appear", "vanish", _cross, 0.82, _appear),
)
CLASSES = [name for pair in PAIRS for name in (pair.forward, pair.backward)]
ORDER_GROUPS = [group for group, _ in enumerate(PAIRS) for _ in range(2)]
"""Number of each class's pair."""


def class_of(index: int) -> int:
    """Return the label of clip `index`. Labels cycle, so any multiple of ten clips is balanced."""
    return index % len(CLASSES)


def draw_clip(split: str, seed: int, index: int, size: int = 64, frames: tuple[int, ...] = (24, 40)) -> Array:
    """Draw video_THWC, uint8 RGB. An odd index gives the clip before it, played backward."""
    drawing, backward = divmod(index, 2)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([SPLITS[split], seed, drawing])))
    video_THWC = _draw(rng, PAIRS[drawing % len(PAIRS)], size, int(rng.choice(frames)))
    return np.ascontiguousarray(video_THWC[::-1]) if backward else video_THWC


def _draw(rng: np.random.Generator, pair: Pair, size: int, num_frames: int) -> Array:
    """Draw a textured background, in half of the clips a still grey shape, the pair's moving shape, and noise per frame."""
    image_HWC = _background(rng, size)
    y_HW, x_HW = (np.mgrid[:size, :size] + 0.5) / size

    if rng.random() < 0.5:
        shape = PAIRS[rng.integers(len(PAIRS))].shape
        radius, centre_x, centre_y = rng.uniform(0.06, 0.11), *rng.uniform(0.1, 0.9, size=2)
        distance_HW = radius * size * shape((x_HW - centre_x) / radius, (y_HW - centre_y) / radius)
        cover_HW1 = np.clip(0.5 - distance_HW, 0.0, 1.0)[..., None]
        image_HWC = image_HWC + cover_HW1 * (rng.uniform(0.2, 0.7) - image_HWC)

    track = pair.track(rng, np.linspace(0.0, 1.0, num_frames))
    colour_C = np.array(
        colorsys.hsv_to_rgb((pair.hue + rng.uniform(-0.04, 0.04)) % 1.0, rng.uniform(0.65, 1.0), rng.uniform(0.75, 1.0))
    )
    radius_T11 = track.radius_T[:, None, None]
    cos_T11, sin_T11 = np.cos(track.angle_T)[:, None, None], np.sin(track.angle_T)[:, None, None]
    x_THW = (x_HW - track.x_T[:, None, None]) / radius_T11
    y_THW = (y_HW - track.y_T[:, None, None]) / radius_T11
    distance_THW = pair.shape(x_THW * cos_T11 + y_THW * sin_T11, y_THW * cos_T11 - x_THW * sin_T11)
    cover_THW = np.clip(0.5 - distance_THW * radius_T11 * size, 0.0, 1.0) * track.opacity_T[:, None, None]

    # Single precision and in place from here: these arrays are the largest and take most of the time.
    video_THWC = rng.standard_normal((num_frames, size, size, 3), dtype=np.float32)
    video_THWC *= np.float32(rng.uniform(0.005, 0.025))
    video_THWC += image_HWC.astype(np.float32)
    video_THWC += cover_THW.astype(np.float32)[..., None] * (colour_C - image_HWC).astype(np.float32)
    np.clip(video_THWC, 0.0, 1.0, out=video_THWC)
    video_THWC *= 255.0
    return np.rint(video_THWC, out=video_THWC).astype(np.uint8)


def _background(rng: np.random.Generator, size: int) -> Array:
    """Draw image_HWC of smooth, nearly grey noise: random values on a coarse grid, linearly interpolated."""
    cells = int(rng.integers(3, 9))
    grid = rng.uniform(0.15, 0.45) + rng.uniform(0.04, 0.14) * rng.standard_normal((cells, cells, 1))
    grid = grid + 0.03 * rng.standard_normal((cells, cells, 3))
    position = np.linspace(0.0, cells - 1.0, size)
    low = np.minimum(position.astype(int), cells - 2)
    part = position - low
    rows = grid[low] + part[:, None, None] * (grid[low + 1] - grid[low])
    return rows[:, low] + part[None, :, None] * (rows[:, low + 1] - rows[:, low])


def encode_clip(video_THWC: Array, gop: int = 1, qp: int = QP) -> bytes:
    """Encode an MP4 file (H.264, yuv420p). With the default GOP no frame's pixels depend on another frame (see the top)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = video_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # The bytes must not depend on the number of cores.
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "fast", "x264-params": f"qp={qp}:keyint={gop}:scenecut=0:threads=1"}
        for image_HWC in video_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()

"""A data set of small H.264 clips on which only a network that sees time can win.

Ten classes in five pairs. The two classes of a pair differ in nothing but the order of their frames:

    move_right / move_left, move_down / move_up, grow / shrink, rotate_clockwise / rotate_counterclockwise, appear / vanish

Clips 2j and 2j+1 are twins: one drawing, played forward and backward. A network that averages its answers over single frames
(TSN) answers both twins alike whenever it sees the same frames of both, and is right for one of them at most: 50 % is its
ceiling. To tell "fails on order" from "fails", the *pair* is given away by nearly every frame: each pair has its own kind of
shape and its own family of hues. That is a help, on purpose; the task measures the sense of time and nothing else.

Two things could betray the order without motion, and are kept from it:
- The encoder. A predicted frame depends on the frames before it, and the first frame of a GOP is the sharpest: "sharp and
  large" would mean shrink. Here each frame is coded by itself (GOP of 1) at one fixed quantiser, so a decoded frame is a
  function of the drawn frame alone: a twin's decoded video is its twin's, reversed, bit for bit (tests/test_shapes.py).
- The sampler. TSM's rule cuts a clip in n equal segments of whole frames and leaves the rest at the end unseen; its centre
  frames are symmetric only when a segment has an odd number of frames. The default lengths, 24 and 40, are 8 x 3 and 8 x 5.

Each clip is a pure function of (split, seed, index) and of the data set's size and lengths; clip `index` has class `index % 10`.

Shapes in names: T frames, H height, W width, C colour.
"""

import colorsys
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from .manifest import Manifest, ManifestError, ManifestRow, write_manifest
from .progress import progress
from .scan import BadClip, scan_clip

FORMAT = 2  # raise it with every change of a drawn pixel or an encoder option: a folder of the old kind is then not taken for new
FPS = 24
QP = 22
SPLITS = {"train": 0, "val": 1}  # the first word of each clip's seed: the splits share no clip


class ShapesError(ValueError):
    """A wrong parameter, or a folder that cannot be used; the message says the fix."""


@dataclass(frozen=True)
class ShapesConfig:
    """What decides every byte of the data set."""

    train_clips: int = 960
    val_clips: int = 240
    size: int = 64
    """Height and width in pixels."""
    frames: tuple[int, ...] = (24, 40)
    """The lengths, in frames, among which each clip draws its own."""
    seed: int = 0

    def __post_init__(self) -> None:
        for split in SPLITS:
            clips = self.clips(split)
            if clips < len(CLASSES) or clips % len(CLASSES):
                raise ShapesError(
                    f"--{split}-clips is {clips}: give a positive multiple of {len(CLASSES)}, as each class gets as many clips"
                )
        if self.size < 32 or self.size % 2:
            raise ShapesError(f"--size is {self.size}: give an even number of pixels, 32 or more")
        if not self.frames or min(self.frames) < 8:
            raise ShapesError(f"--frames is {list(self.frames)}: give one or more lengths of 8 frames or more")
        if self.seed < 0:
            raise ShapesError(f"--seed is {self.seed}: give 0 or more")

    def clips(self, split: str) -> int:
        return self.train_clips if split == "train" else self.val_clips


# ------------------------------------------------------------------------------------------------------------------ drawing
# A shape is a signed distance in units of its radius, negative inside: shape(x, y) -> distance, x to the right and y down.

Array = np.ndarray
Shape = Callable[[Array, Array], Array]


def _box(x: Array, y: Array, cx: float, cy: float, half_w: float, half_h: float) -> Array:
    return np.maximum(np.abs(x - cx) - half_w, np.abs(y - cy) - half_h)


def _disc(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 1.0


def _square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.0, 0.0, 0.85, 0.85)


def _star(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.75 - 0.25 * np.cos(5.0 * np.arctan2(x, -y))


def _hand(x: Array, y: Array) -> Array:
    """The hand of a clock, on its pivot: no turn but the full one maps it on itself, so its direction is never ambiguous."""
    return np.minimum(_box(x, y, 0.0, -0.3, 0.12, 0.4), np.hypot(x, y + 0.7) - 0.33)


def _cross(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.0, 0.0, 1.0, 0.3), _box(x, y, 0.0, 0.0, 0.3, 1.0))


@dataclass(frozen=True)
class Track:
    """Where the shape is in each frame: lengths in units of the frame's side, the angle in radians, clockwise on the screen."""

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
    """From the first value of each to the second, in step with `progress_T` (0 to 1); what is not given stays still."""

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
    """The two ends of a move: far enough apart to be seen, far enough from the border to survive a crop."""
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
    """Over the upper half of the dial: that all of the full circle is one turn takes a small network many epochs more to learn."""
    radius = rng.uniform(0.28, 0.34)
    angle = np.deg2rad(rng.uniform(-120.0, -70.0)), np.deg2rad(rng.uniform(70.0, 120.0))
    return _track(rng, progress_T, radius=(radius, radius), angle=angle)


def _appear(rng: np.random.Generator, progress_T: Array) -> Track:
    radius = rng.uniform(0.17, 0.25)
    return _track(rng, progress_T, radius=(radius, radius), opacity=(rng.uniform(-0.15, 0.10), rng.uniform(0.90, 1.15)))


@dataclass(frozen=True)
class Pair:
    forward: str
    backward: str
    shape: Shape
    hue: float
    """The middle of the pair's family of hues, in turns of the colour circle."""
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


def class_of(index: int) -> int:
    """The label of clip `index`; the labels go round, so any multiple of ten clips is balanced."""
    return index % len(CLASSES)


def draw_clip(split: str, seed: int, index: int, size: int = 64, frames: tuple[int, ...] = (24, 40)) -> Array:
    """video_THWC, uint8 RGB. An odd index is the clip before it, played backward."""
    drawing, backward = divmod(index, 2)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([SPLITS[split], seed, drawing])))
    video_THWC = _draw(rng, PAIRS[drawing % len(PAIRS)], size, int(rng.choice(frames)))
    return np.ascontiguousarray(video_THWC[::-1]) if backward else video_THWC


def _draw(rng: np.random.Generator, pair: Pair, size: int, num_frames: int) -> Array:
    """A textured background; in half of the clips a grey shape that stands still; the pair's shape above it; noise per frame."""
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

    # From here on single precision and in place: these arrays are the largest, and most of the time is spent on them.
    video_THWC = rng.standard_normal((num_frames, size, size, 3), dtype=np.float32)
    video_THWC *= np.float32(rng.uniform(0.005, 0.025))
    video_THWC += image_HWC.astype(np.float32)
    video_THWC += cover_THW.astype(np.float32)[..., None] * (colour_C - image_HWC).astype(np.float32)
    np.clip(video_THWC, 0.0, 1.0, out=video_THWC)
    video_THWC *= 255.0
    return np.rint(video_THWC, out=video_THWC).astype(np.uint8)


def _background(rng: np.random.Generator, size: int) -> Array:
    """image_HWC of smooth, nearly grey noise: random values on a coarse grid, linearly interpolated."""
    cells = int(rng.integers(3, 9))
    grid = rng.uniform(0.15, 0.45) + rng.uniform(0.04, 0.14) * rng.standard_normal((cells, cells, 1))
    grid = grid + 0.03 * rng.standard_normal((cells, cells, 3))
    position = np.linspace(0.0, cells - 1.0, size)
    low = np.minimum(position.astype(int), cells - 2)
    part = position - low
    rows = grid[low] + part[:, None, None] * (grid[low + 1] - grid[low])
    return rows[:, low] + part[None, :, None] * (rows[:, low + 1] - rows[:, low])


def encode_clip(video_THWC: Array, gop: int = 1, qp: int = QP) -> bytes:
    """An MP4 of H.264, yuv420p. With the default GOP no frame's pixels depend on another frame (see the top of this file)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = video_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the bytes must not depend on the machine's number of cores
        stream.options = {"preset": "fast", "x264-params": f"qp={qp}:keyint={gop}:scenecut=0:threads=1"}
        for image_HWC in video_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Written:
    """What `write_shapes` did. `new_clips` is 0 where all was there already."""

    rows: dict[str, int]
    new_clips: int
    bytes: int


def write_shapes(root: Path, config: ShapesConfig, workers: int = 1, force: bool = False) -> Written:
    """Write the data set, or what is missing of it, under `root`.

    dataset.json (the parameters) comes first, then the clips, then the manifests; each file is written aside and renamed, so a file
    that has its name is whole. What was interrupted goes on from there.
    """
    root = Path(root)
    if workers < 1:
        raise ShapesError(f"--workers is {workers}: give 1 or more")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            _claim(root, config, force)
            return _find_finished(root, config) or _write_missing(root, config, workers)
    except OSError as error:
        raise ShapesError(
            f"cannot write {error.filename or root}: {error.strerror or error}; free space there and run the same command, "
            "which goes on where it stopped, or choose another folder with --root"
        ) from error
    except BrokenProcessPool as error:
        raise ShapesError(
            "a worker process died (out of memory, or killed); run the same command with fewer --workers to go on from there"
        ) from error


def _write_missing(root: Path, config: ShapesConfig, workers: int) -> Written:
    for leftover in root.glob("**/*.tmp"):
        leftover.unlink()
    new_clips, total_bytes = 0, 0
    for split in SPLITS:
        for name in CLASSES:
            (root / split / name).mkdir(parents=True, exist_ok=True)
        rows: dict[int, ManifestRow] = {}
        for index, row, is_new in progress(_write_all(root, config, split, workers), config.clips(split), split):
            rows[index] = row
            new_clips += is_new
            total_bytes += row.length
        write_manifest(root / f"{split}.arrow", (rows[index] for index in sorted(rows)), CLASSES, ORDER_GROUPS, split)
    return Written({split: config.clips(split) for split in SPLITS}, new_clips, total_bytes)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back from a process that dies; wait while another one holds it."""
    folder = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is writing {root}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _parameters(config: ShapesConfig) -> dict[str, Any]:
    return json.loads(json.dumps({"dataset": "shapes", "format": FORMAT, "fps": FPS, "qp": QP, **asdict(config)}))


def _claim(root: Path, config: ShapesConfig, force: bool) -> None:
    """Make `root` ours: holding dataset.json with these parameters and no clip of other ones, or an error."""
    ours, path = _parameters(config), root / "dataset.json"
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
            if theirs["dataset"] != "shapes":
                raise KeyError
        except (ValueError, KeyError, TypeError):
            raise ShapesError(
                f"{path} was not written by prepare.py shapes; choose another folder with --root"
            ) from None
        changed = [f"{key} is {theirs.get(key)}, asked for {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
        if not changed:
            return
        if not force:
            raise ShapesError(
                f"{root} holds shapes with other parameters ({'; '.join(changed)}); "
                "choose another folder with --root, or write it anew with --force"
            )
        _remove(root)
    elif any(entry.suffix != ".tmp" for entry in root.iterdir()):
        raise ShapesError(
            f"{root} is not empty and has no dataset.json of prepare.py shapes; choose another folder with --root"
        )
    _write_aside(path, (json.dumps(ours, indent=2) + "\n").encode())


def _remove(root: Path) -> None:
    """Remove what we wrote and nothing else; dataset.json stays to the end, so that a removal cut short can be taken up again."""
    for split in SPLITS:
        (root / f"{split}.arrow").unlink(missing_ok=True)
        for name in CLASSES:
            shutil.rmtree(root / split / name, ignore_errors=True)


def _find_finished(root: Path, config: ShapesConfig) -> Written | None:
    """None unless both manifests are there and every clip has the length that they say."""
    total_bytes = 0
    for split in SPLITS:
        try:
            manifest = Manifest.open(root / f"{split}.arrow")
            if len(manifest) != config.clips(split):
                return None
            for row in map(manifest.row, range(len(manifest))):
                if os.stat(root / row.path).st_size != row.length:
                    return None
                total_bytes += row.length
        except (ManifestError, OSError):
            return None
    return Written({split: config.clips(split) for split in SPLITS}, 0, total_bytes)


def _write_all(root: Path, config: ShapesConfig, split: str, workers: int) -> Iterator[tuple[int, ManifestRow, bool]]:
    """(index, row, whether it is new) of every clip of the split, in no particular order."""
    indices = range(config.clips(split))
    if workers == 1:
        yield from _write_some(root, config, split, indices)
        return
    # spawn: the caller may have threads or a GPU context, neither of which survives a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent) as pool:
        chunks = [indices[start : start + 20] for start in range(0, len(indices), 20)]
        pending = {pool.submit(_write_chunk, root, config, split, chunk) for chunk in chunks}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from future.result()
        finally:
            for future in pending:
                future.cancel()


def _die_with_parent() -> None:
    """A pool's worker outlives a parent that was killed, waiting for ever on a queue whose other end it holds itself."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_chunk(root: Path, config: ShapesConfig, split: str, indices: range) -> list[tuple[int, ManifestRow, bool]]:
    return list(_write_some(root, config, split, indices))


def _write_some(
    root: Path, config: ShapesConfig, split: str, indices: range
) -> Iterator[tuple[int, ManifestRow, bool]]:
    for index in indices:
        label = class_of(index)
        relative = f"{split}/{CLASSES[label]}/{index:06d}.mp4"
        try:
            facts, is_new = scan_clip(root / relative), False
        except BadClip:  # not there yet, or damaged
            _write_aside(root / relative, encode_clip(draw_clip(split, config.seed, index, config.size, config.frames)))
            facts, is_new = scan_clip(root / relative), True
        yield index, ManifestRow(path=relative, offset=0, label=label, **asdict(facts)), is_new


def _write_aside(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error

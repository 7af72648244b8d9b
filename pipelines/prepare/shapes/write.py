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
  function of the drawn frame alone: a twin's decoded video is its twin's, reversed, bit for bit (test_shapes.py).
- The sampler. TSM's rule cuts a clip in n equal segments of whole frames and leaves the rest at the end unseen; its centre
  frames are symmetric only when a segment has an odd number of frames. The default lengths, 24 and 40, are 8 x 3 and 8 x 5.

Each clip is a pure function of (split, seed, index) and of the data set's size and lengths; clip `index` has class `index % 10`.

Shapes in names: T frames, H height, W width, C colour.
"""

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import BadClip
from pipelines.manifest import Manifest, ManifestError, ManifestRow, write_manifest
from pipelines.prepare.progress import progress
from pipelines.prepare.scan.scan_clip import scan_clip
from runtime.atomic_write import TEMPORARY_SUFFIX, atomic_write
from runtime.child_processes import exit_with_parent
from runtime.file_lock import file_lock

from .drawing import CLASSES, FPS, ORDER_GROUPS, QP, SPLITS, class_of, draw_clip, encode_clip

FORMAT = 2  # raise it with every change of a drawn pixel or an encoder option: a folder of the old kind is then not taken for new


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
    for leftover in root.glob(f"**/*{TEMPORARY_SUFFIX}"):
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
    """Hold the folder's lock; says so and waits while another process holds it."""
    with file_lock(root, wait=False) as held:
        if held:
            yield
            return
    print(f"another process is writing {root}; waiting for it", file=sys.stderr, flush=True)
    with file_lock(root):
        yield


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
    elif any(entry.suffix != TEMPORARY_SUFFIX for entry in root.iterdir()):
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
    with ProcessPoolExecutor(workers, mp_context=context, initializer=exit_with_parent) as pool:
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
    try:
        # Generated again by the same command, so not synced one by one.
        with atomic_write(path, durable=False) as file:
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error

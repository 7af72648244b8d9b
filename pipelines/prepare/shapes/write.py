"""Write a generated data set: clips, manifests, and dataset.json with the parameters."""

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import BadClip
from pipelines.manifest import Manifest, ManifestError, ManifestRow, write_manifest
from pipelines.prepare.errors import DataSetError, cannot_write
from pipelines.prepare.progress import progress
from pipelines.prepare.scan.scan_clip import scan_clip
from runtime.atomic_write import TEMPORARY_SUFFIX, atomic_write
from runtime.child_processes import exit_with_parent
from runtime.file_lock import file_lock, lease_path

from . import drawing, moving_textures
from .drawing import FPS, QP, SPLITS, Array, encode_clip


@dataclass(frozen=True)
class Kind:
    """A kind of generated data set. Clip `index` has class `index % len(classes)`, so the classes are balanced."""

    name: str
    """Sub-command of prepare.py."""
    format: int
    """Raise it when a drawn pixel or an encoder option changes, so that older folders are not reused."""
    classes: list[str]
    order_groups: list[int]
    """Number of the group of each class whose members differ only in the order of frames."""
    draw_clip: Callable[[str, int, int, int, tuple[int, ...]], Array]
    """(split, seed, index, size, frames) -> video_THWC."""


SHAPES = Kind("shapes", 2, drawing.CLASSES, drawing.ORDER_GROUPS, drawing.draw_clip)
MOTIONS = Kind("motions", 2, moving_textures.CLASSES, moving_textures.ORDER_GROUPS, moving_textures.draw_clip)


@dataclass(frozen=True)
class GeneratedConfig:
    """The parameters that determine every byte of the data set."""

    kind: Kind = SHAPES
    train_clips: int = 960
    val_clips: int = 240
    size: int = 64
    """Height and width in pixels."""
    frames: tuple[int, ...] = (24, 40)
    """The lengths, in frames, of which each clip gets a random one."""
    seed: int = 0

    def __post_init__(self) -> None:
        for split in SPLITS:
            clips = self.clips(split)
            if clips < 1 or clips % len(self.kind.classes):
                raise DataSetError(
                    f"--{split}-clips is {clips}. Fix: give a positive multiple of "
                    f"{len(self.kind.classes)}, the number of classes"
                )
        if self.size < 32 or self.size % 2:
            raise DataSetError(f"--size is {self.size}. Fix: give an even number of pixels, 32 or more")
        if not self.frames or min(self.frames) < 8:
            raise DataSetError(f"--frames is {list(self.frames)}. Fix: give one or more lengths of 8 frames or more")
        if self.seed < 0:
            raise DataSetError(f"--seed is {self.seed}. Fix: give 0 or more")

    def clips(self, split: str) -> int:
        """Return the number of clips of a split."""
        return self.train_clips if split == "train" else self.val_clips


@dataclass(frozen=True)
class Written:
    """The result of `write_generated`. `new_clips` is 0 if the data set was complete already."""

    rows: dict[str, int]
    new_clips: int
    bytes: int


def write_generated(root: Path, config: GeneratedConfig, workers: int = 1, force: bool = False) -> Written:
    """Write the data set, or its missing files, under `root`.

    dataset.json (the parameters) is written first, then the clips, then the manifests, each atomically. An interrupted call
    resumes where it stopped.
    """
    root = Path(root)
    if workers < 1:
        raise DataSetError(f"--workers is {workers}. Fix: give 1 or more")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _folder_lock(root):
            _claim(root, config, force)
            return _find_finished(root, config) or _write_missing(root, config, workers)
    except OSError as error:
        raise DataSetError(cannot_write(error.filename or root, error, "--root")) from error
    except BrokenProcessPool as error:
        raise DataSetError(
            "a worker process died (out of memory, or killed). Fix: run the same command again with fewer --workers; it resumes"
        ) from error


def _write_missing(root: Path, config: GeneratedConfig, workers: int) -> Written:
    for leftover in root.glob(f"**/*{TEMPORARY_SUFFIX}"):
        leftover.unlink()
    kind, new_clips, total_bytes = config.kind, 0, 0
    for split in SPLITS:
        for name in kind.classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
        rows: dict[int, ManifestRow] = {}
        for index, row, is_new in progress(_write_all(root, config, split, workers), config.clips(split), split):
            rows[index] = row
            new_clips += is_new
            total_bytes += row.length
        write_manifest(
            root / f"{split}.arrow", (rows[index] for index in sorted(rows)), kind.classes, kind.order_groups, split
        )
    return Written({split: config.clips(split) for split in SPLITS}, new_clips, total_bytes)


@contextmanager
def _folder_lock(root: Path) -> Iterator[None]:
    """Hold the folder's lock; report and wait while another process holds it."""
    with file_lock(root, wait=False) as held:
        if held:
            yield
            return
    print(f"another process is writing {root}; waiting for it", file=sys.stderr, flush=True)
    with file_lock(root):
        yield


def _parameters(config: GeneratedConfig) -> dict[str, Any]:
    fields = {name: value for name, value in vars(config).items() if name != "kind"}
    kind = {"dataset": config.kind.name, "format": config.kind.format}
    return json.loads(json.dumps({**kind, "fps": FPS, "qp": QP, **fields}))


def _claim(root: Path, config: GeneratedConfig, force: bool) -> None:
    """Write dataset.json with these parameters, unless the folder has it. Refuse a folder with other content."""
    wanted, path, name = _parameters(config), root / "dataset.json", config.kind.name
    if path.exists():
        try:
            found = json.loads(path.read_text())
            if found["dataset"] != name:
                raise KeyError
        except (ValueError, KeyError, TypeError):
            raise DataSetError(
                f"{path} was not written by prepare.py {name}. Fix: choose another folder with --root"
            ) from None
        changed = [f"{key} is {found.get(key)}, not {wanted[key]}" for key in wanted if found.get(key) != wanted[key]]
        if not changed:
            return
        if not force:
            raise DataSetError(
                f"{root} contains {name} with other parameters ({'; '.join(changed)}). "
                "Fix: choose another folder with --root, or replace the clips with --force"
            )
        _remove(root, config.kind)
    elif any(entry.suffix != TEMPORARY_SUFFIX and entry != lease_path(root) for entry in root.iterdir()):
        raise DataSetError(
            f"{root} is not empty and has no dataset.json of prepare.py {name}. Fix: choose another folder with --root"
        )
    _write_file(path, (json.dumps(wanted, indent=2) + "\n").encode())


def _remove(root: Path, kind: Kind) -> None:
    """Remove only files that this module wrote; keep dataset.json, so that an interrupted removal can be repeated."""
    for split in SPLITS:
        (root / f"{split}.arrow").unlink(missing_ok=True)
        for name in kind.classes:
            shutil.rmtree(root / split / name, ignore_errors=True)


def _find_finished(root: Path, config: GeneratedConfig) -> Written | None:
    """Return None unless both manifests exist and every clip has the length recorded there."""
    total_bytes = 0
    for split in SPLITS:
        try:
            manifest = Manifest.open(root / f"{split}.arrow")
            # A manifest of an older version does not say that the fast decoder may decode the clips.
            if len(manifest) != config.clips(split) or manifest.fast_seek()[0] < len(manifest):
                return None
            manifest.require_as_written()
            for row in map(manifest.row, range(len(manifest))):
                if os.stat(root / row.path).st_size != row.length:
                    return None
                total_bytes += row.length
        except (ManifestError, OSError):
            return None
    return Written({split: config.clips(split) for split in SPLITS}, 0, total_bytes)


def _write_all(
    root: Path, config: GeneratedConfig, split: str, workers: int
) -> Iterator[tuple[int, ManifestRow, bool]]:
    """Write the missing clips of a split. Yields (index, row, whether it is new) of all clips, in any order."""
    indices = range(config.clips(split))
    if workers == 1:
        yield from _write_some(root, config, split, indices)
        return
    # spawn: a fork would break the caller's threads and GPU context.
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


def _write_chunk(
    root: Path, config: GeneratedConfig, split: str, indices: range
) -> list[tuple[int, ManifestRow, bool]]:
    return list(_write_some(root, config, split, indices))


def _write_some(
    root: Path, config: GeneratedConfig, split: str, indices: range
) -> Iterator[tuple[int, ManifestRow, bool]]:
    kind = config.kind
    for index in indices:
        label = index % len(kind.classes)
        relative = f"{split}/{kind.classes[label]}/{index:06d}.mp4"
        try:
            facts, is_new = scan_clip(root / relative, ours=True), False
        # Missing or damaged.
        except BadClip:
            video_THWC = kind.draw_clip(split, config.seed, index, config.size, config.frames)
            _write_file(root / relative, encode_clip(video_THWC))
            facts, is_new = scan_clip(root / relative, ours=True), True
        yield index, ManifestRow(path=relative, offset=0, label=label, **asdict(facts)), is_new


def _write_file(path: Path, content: bytes) -> None:
    """Write a file atomically; an error names it."""
    try:
        # Not durable: the same command generates a lost file again.
        with atomic_write(path, durable=False) as file:
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error

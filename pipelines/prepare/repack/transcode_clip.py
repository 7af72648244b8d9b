"""One clip, encoded anew, looked at again, and then put in its place."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.decoding.video import EncodedVideo
from pipelines.errors import BadClip
from pipelines.manifest import JPEG_FRAMES, ManifestRow
from pipelines.prepare.scan.scan_clip import scan_video
from runtime.atomic_write import TEMPORARY_SUFFIX, atomic_write

from .encoders import ENCODERS, encode_jpeg, encode_video
from .open_manifests import open_once
from .rescale import Image, frame_rate, pictures_of_video, scaled_pictures, scaled_size

_PICTURES_COMPARED = 5
_MAX_DIFFERENCE = 12.0
"""Of grey levels on average, between a frame and what became of it: far above what a poor quality costs, far below the
difference of two scenes."""
_FRAME_NAME = "%05d.jpg"


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of every clip."""

    codec: str
    short_side: int
    gop: int
    quality: int


@dataclass(frozen=True)
class ClipTask:
    """Row `number` of a manifest, and where its new clip goes, without its ending."""

    manifest: Path
    number: int
    target: Path
    """Folder of the data set."""
    stem: str
    settings: Settings


@dataclass(frozen=True)
class Outcome:
    """Of one task: nothing, or why the clip is left out (`bad`), or why nothing can be written."""

    bad: str = ""
    fatal: str = ""


def find_row(task: ClipTask, source: ManifestRow) -> ManifestRow | None:
    """The row of a clip that is finished; None where it is not. What has its name has been checked before it got it."""
    encoder = ENCODERS[task.settings.codec]
    path = task.target / (task.stem + encoder.suffix)
    try:
        if encoder.codec == JPEG_FRAMES:
            sizes = [os.stat(path / (_FRAME_NAME % number)).st_size for number in range(1, source.num_frames + 1)]
            length, name, first = (sum(sizes) if all(sizes) else 0), f"{task.stem}/{_FRAME_NAME}", 1
        else:
            length, name, first = path.stat().st_size, task.stem + encoder.suffix, 0
    except OSError:
        return None
    if length == 0:
        return None
    width, height = scaled_size(source, task.settings.short_side)
    return ManifestRow(name, first, length, source.label, source.num_frames, encoder.codec, width, height, 0)


def find_reason(task: ClipTask) -> str | None:
    """Why the clip was left out; None unless it was."""
    try:
        return _reason_path(task).read_text()
    except OSError:
        return None


def _reason_path(task: ClipTask) -> Path:
    return task.target / f"{task.stem}.bad"


def transcode_clip(task: ClipTask) -> Outcome:
    manifest = open_once(task.manifest)
    root, row = manifest.root, manifest.row(task.number)
    path = task.target / (task.stem + ENCODERS[task.settings.codec].suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            (_write_frames if task.settings.codec == "jpeg" else _write_video)(task, root, row, path)
        except BadClip as error:
            # A file that cannot be read now may be there for the next call.
            if not isinstance(error.__cause__, OSError):
                with atomic_write(_reason_path(task)) as file:
                    file.write(str(error).encode(errors="surrogateescape"))
            return Outcome(bad=str(error))
    except OSError as error:
        return Outcome(
            fatal=f"cannot write {path}: {error.strerror or error}. Fix: free space there or choose another folder with "
            "--to, then run the same command, which goes on where it stopped"
        )
    return Outcome()


def _write_video(task: ClipTask, root: Path, row: ManifestRow, path: Path) -> None:
    """Encode in memory, look at it, write it down."""
    settings, encoder = task.settings, ENCODERS[task.settings.codec]
    size, rate, kept = scaled_size(row, settings.short_side), frame_rate(root, row), _Kept(row.num_frames)
    if min(size) < encoder.least_side:
        raise BadClip(
            f"{root / row.path}: {encoder.name} needs {encoder.least_side} pixels a side, and it has {min(size)}"
        )
    pictures = kept.watch(scaled_pictures(root, row, size))
    try:
        content = encode_video(encoder, pictures, rate, settings.quality, settings.gop)
    except av.FFmpegError as error:
        raise BadClip(f"{root / row.path}: {encoder.name} cannot encode it at {size[0]}x{size[1]} ({error})") from error
    video = EncodedVideo(f"{root / row.path}, encoded anew", path.suffix, np.frombuffer(content, np.uint8))
    facts = scan_video(video, len(content))
    found = facts.num_frames, facts.codec, facts.width, facts.height, facts.rotation
    if found != (row.num_frames, encoder.codec, *size, 0):
        raise BadClip(f"{video.name}: is {found}, not {(row.num_frames, encoder.codec, *size, 0)}")
    kept.compare(video.name, pictures_of_video(video, replace(row, rotation=0), size))
    with atomic_write(path) as file:
        file.write(content)


def _write_frames(task: ClipTask, root: Path, row: ManifestRow, path: Path) -> None:
    """Into a folder that gets its name once they have been looked at."""
    settings, encoder = task.settings, ENCODERS[task.settings.codec]
    size, kept = scaled_size(row, settings.short_side), _Kept(row.num_frames)
    aside = path.with_name(path.name + TEMPORARY_SUFFIX)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        pictures = kept.watch(scaled_pictures(root, row, size))
        for number, content in enumerate(encode_jpeg(encoder, pictures, settings.quality), start=1):
            (aside / (_FRAME_NAME % number)).write_bytes(content)
        made = replace(row, path=f"{aside.name}/{_FRAME_NAME}", offset=1, codec=JPEG_FRAMES, rotation=0)
        kept.compare(f"{root / row.path}, encoded anew", scaled_pictures(path.parent, made, size))
        shutil.rmtree(path, ignore_errors=True)  # frames of no bytes, from before the machine lost its power
        os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


class _Kept:
    """A few of the source's pictures, evenly spread, until the result can be compared with them."""

    def __init__(self, num_frames: int) -> None:
        self._numbers = set(np.linspace(0, num_frames - 1, _PICTURES_COMPARED).round().astype(int).tolist())
        self._pictures: dict[int, Image] = {}

    def watch(self, pictures: Iterator[Image]) -> Iterator[Image]:
        for number, image_HWC in enumerate(pictures):
            if number in self._numbers:
                self._pictures[number] = image_HWC
            yield image_HWC

    def compare(self, name: str, pictures: Iterator[Image]) -> None:
        """Raises BadClip when a picture has become another one, or there are more or fewer of them."""
        for number, image_HWC in enumerate(pictures):
            if number in self._numbers:
                difference = _mean_difference(image_HWC, self._pictures[number])
                if difference > _MAX_DIFFERENCE:
                    raise BadClip(
                        f"{name}: frame {number} differs by {difference:.1f} grey levels on average; try a better --quality"
                    )


def _mean_difference(one_HWC: NDArray[np.uint8], other_HWC: NDArray[np.uint8]) -> float:
    return float(np.abs(one_HWC.astype(np.int16) - other_HWC).mean())

"""Transcode one clip: encode it, check the result against the source, then write it atomically."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.decoding.video import EncodedVideo
from pipelines.errors import BadClip
from pipelines.jpeg_clips import JPEG_FRAMES
from pipelines.manifest import ManifestRow
from pipelines.prepare.scan.scan_clip import ClipFacts, scan_video
from runtime.atomic_write import atomic_write

from .clip_task import ClipTask, atomic_folder
from .encoders import ENCODERS, Encoder, Image, encode_jpeg, encode_video
from .rescale import frame_rate, scaled_images, scaled_size, scaled_video

_IMAGES_COMPARED = 5
_MAX_DIFFERENCE = 12.0
"""Mean grey levels between a frame and its transcoded form: far above the loss at a poor quality, far below the difference
between two scenes."""
_FRAME_NAME = "%05d.jpg"


@dataclass(frozen=True)
class Settings:
    """The options that determine every clip's encoding."""

    codec: str
    short_side: int
    gop: int
    quality: int


@dataclass(frozen=True)
class TranscodeTask(ClipTask):
    """The task of transcoding one clip."""

    settings: Settings

    @property
    def path(self) -> Path:
        return self.target / (self.stem + ENCODERS[self.settings.codec].suffix)

    def find_row(self, source: ManifestRow) -> ManifestRow | None:
        encoder = ENCODERS[self.settings.codec]
        try:
            if encoder.codec == JPEG_FRAMES:
                numbers = range(1, source.num_frames + 1)
                sizes = [os.stat(self.path / (_FRAME_NAME % number)).st_size for number in numbers]
                length, name, first = (sum(sizes) if all(sizes) else 0), f"{self.stem}/{_FRAME_NAME}", 1
            else:
                length, name, first = self.path.stat().st_size, self.stem + encoder.suffix, 0
        except OSError:
            return None
        if length == 0:
            return None
        width, height = scaled_size(source, self.settings.short_side)
        facts = written_facts(source, length, encoder, (width, height))
        return ManifestRow(name, first, label=source.label, **asdict(facts))

    def write(self, root: Path, source: ManifestRow) -> None:
        (_write_frames if self.settings.codec == "jpeg" else _write_video)(self, root, source)


def written_facts(source: ManifestRow, length: int, encoder: Encoder, size: tuple[int, int]) -> ClipFacts:
    """Compute the facts of a transcoded clip of `length` bytes, of which each one is checked before it gets its name."""
    fast_seek = encoder.codec != JPEG_FRAMES
    return ClipFacts(length, source.num_frames, encoder.codec, *size, 0, *encoder.colours, fast_seek=fast_seek)


def _write_video(task: TranscodeTask, root: Path, row: ManifestRow) -> None:
    """Encode in memory, check the result, then write the file."""
    settings, encoder = task.settings, ENCODERS[task.settings.codec]
    size, rate, references = scaled_size(row, settings.short_side), frame_rate(root, row), _References(row.num_frames)
    if min(size) < encoder.least_side:
        raise BadClip(
            f"{root / row.path}: {encoder.name} needs {encoder.least_side} pixels a side, but it has {min(size)}"
        )
    images = references.recorded(scaled_images(root, row, size))
    try:
        content = encode_video(encoder, images, rate, settings.quality, settings.gop)
    except av.FFmpegError as error:
        raise BadClip(f"{root / row.path}: {encoder.name} cannot encode it at {size[0]}x{size[1]} ({error})") from error
    video = EncodedVideo(f"{root / row.path}, transcoded", np.frombuffer(content, np.uint8))
    facts, expected = scan_video(video, len(content), ours=True), written_facts(row, len(content), encoder, size)
    if facts != expected:
        raise BadClip(f"{video.name}: is {facts}, not {expected}")
    references.compare(video.name, scaled_video(video, replace(row, rotation=0, mirrored=False), size))
    with atomic_write(task.path) as file:
        file.write(content)


def _write_frames(task: TranscodeTask, root: Path, row: ManifestRow) -> None:
    """Write the frames to a temporary folder, check them, then rename the folder."""
    settings, encoder = task.settings, ENCODERS[task.settings.codec]
    size, references = scaled_size(row, settings.short_side), _References(row.num_frames)
    with atomic_folder(task.path) as folder:
        images = references.recorded(scaled_images(root, row, size))
        for number, content in enumerate(encode_jpeg(encoder, images, settings.quality), start=1):
            (folder / (_FRAME_NAME % number)).write_bytes(content)
        written = replace(row, path=f"{folder.name}/{_FRAME_NAME}", offset=1, codec=JPEG_FRAMES, rotation=0)
        written = replace(written, mirrored=False)
        references.compare(f"{root / row.path}, transcoded", scaled_images(folder.parent, written, size))


class _References:
    """A few of the source's images, evenly spread, to compare the transcoded ones with."""

    def __init__(self, num_frames: int) -> None:
        self._numbers = set(np.linspace(0, num_frames - 1, _IMAGES_COMPARED).round().astype(int).tolist())
        self._images: dict[int, Image] = {}

    def recorded(self, images: Iterator[Image]) -> Iterator[Image]:
        """Yield the source's images, and keep the references among them."""
        for number, image_HWC in enumerate(images):
            if number in self._numbers:
                self._images[number] = image_HWC
            yield image_HWC

    def compare(self, name: str, images: Iterator[Image]) -> None:
        """Raise BadClip when an image differs too much from its reference."""
        for number, image_HWC in enumerate(images):
            if number in self._numbers:
                difference = _mean_difference(image_HWC, self._images[number])
                if difference > _MAX_DIFFERENCE:
                    raise BadClip(
                        f"{name}: frame {number} differs by {difference:.1f} grey levels on average. "
                        "Fix: try a better --quality"
                    )


def _mean_difference(one_HWC: NDArray[np.uint8], other_HWC: NDArray[np.uint8]) -> float:
    return float(np.abs(one_HWC.astype(np.int16) - other_HWC).mean())

"""Decode a clip's frames to upright RGB images of another size, to encode them or to compare them with the result."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipelines.decoding.clip_bytes import encoded_video, image_bytes
from pipelines.decoding.orientation import upright
from pipelines.decoding.video import EncodedVideo, usable_frames, video_stream
from pipelines.errors import BadClip
from pipelines.jpeg_clips import JPEG_FRAMES
from pipelines.manifest import ManifestRow

from .encoders import Image

# Frames per second of clips without a usable frame rate.
_DEFAULT_RATE = Fraction(24)


def scaled_size(row: ManifestRow, short_side: int) -> tuple[int, int]:
    """Return the upright, even (width, height) with a shorter side of at most `short_side` pixels; never enlarge."""
    width, height = row.upright_size
    scale = min(1.0, short_side / min(width, height))
    if scale == 1.0:
        return max(2, width // 2 * 2), max(2, height // 2 * 2)
    return tuple(max(2, 2 * round(side * scale / 2)) for side in (width, height))  # type: ignore[return-value]


def frame_rate(root: Path, row: ManifestRow) -> Fraction:
    """Return the approximate frames per second. Training does not depend on it: it reads frames by number."""
    if row.codec == JPEG_FRAMES:
        return _DEFAULT_RATE
    video = encoded_video(root, row)
    try:
        with video_stream(video) as (_, stream):
            rate = stream.average_rate
    except av.FFmpegError as error:
        raise BadClip(f"{video.name}: cannot be opened ({error.strerror or error})") from error
    if not rate or not 1 <= rate <= 240:
        return _DEFAULT_RATE
    return Fraction(rate).limit_denominator(1001)


def scaled_images(root: Path, row: ManifestRow, size: tuple[int, int]) -> Iterator[Image]:
    """Yield every frame of a clip, scaled to (width, height) `size`, in display order.

    Raises BadClip when their number differs from the row's.
    """
    if row.codec == JPEG_FRAMES:
        frames = _frames_of_jpeg(image_bytes(root, row, number) for number in range(row.num_frames))
        return _scaled(str(root / row.path), frames, row, size)
    return scaled_video(encoded_video(root, row), row, size)


def scaled_video(video: EncodedVideo, row: ManifestRow, size: tuple[int, int]) -> Iterator[Image]:
    """Yield every frame of a video, as `scaled_images` does."""
    return _scaled(video.name, _frames_of_video(video), row, size)


def _scaled(name: str, frames: Iterator[av.VideoFrame], row: ManifestRow, size: tuple[int, int]) -> Iterator[Image]:
    if row.rotation % 90:
        raise BadClip(f"{name}: rotated by {row.rotation} degrees, which is not a multiple of 90")
    width, height = reversed(size) if row.rotation % 180 else size
    count = 0
    for frame in frames:
        count += 1
        if count > row.num_frames:
            break
        image_HWC = np.asarray(
            frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC", threads=1), np.uint8
        )
        yield np.ascontiguousarray(upright(image_HWC, row))
    if count != row.num_frames:
        found = "more" if count > row.num_frames else f"{count}"
        raise BadClip(f"{name}: {found} frames, but its manifest has {row.num_frames}")


def _frames_of_video(video: EncodedVideo) -> Iterator[av.VideoFrame]:
    try:
        with video_stream(video) as (container, stream):
            yield from usable_frames(video.name, container, stream)
    except av.FFmpegError as error:
        raise BadClip(f"{video.name}: does not decode ({error.strerror or error})") from error


def _frames_of_jpeg(encoded: Iterator[tuple[str, bytes]]) -> Iterator[av.VideoFrame]:
    # Imported here because it loads torch, which videos do not need.
    from pipelines.decoding.jpeg import decode_jpeg_bytes

    for name, content in encoded:
        image_CHW = decode_jpeg_bytes(name, content)
        yield av.VideoFrame.from_ndarray(np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy()), format="rgb24")

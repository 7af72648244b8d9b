"""The frames of a clip as upright RGB pictures of another size: what is encoded anew, and what the result is compared with."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.decoding.clip_bytes import encoded_video, frame_bytes
from pipelines.decoding.video import EncodedVideo, open_video
from pipelines.errors import BadClip
from pipelines.manifest import JPEG_FRAMES, ManifestRow

Image = NDArray[np.uint8]
"""(H, W, 3), RGB."""
_PLAIN_RATE = Fraction(24)  # of what has none of its own


def scaled_size(row: ManifestRow, short_side: int) -> tuple[int, int]:
    """(width, height), upright and even, with a shorter side of `short_side` pixels or of its own where that is less."""
    width, height = row.upright_size
    scale = min(1.0, short_side / min(width, height))
    if scale == 1.0:
        return max(2, width // 2 * 2), max(2, height // 2 * 2)
    return tuple(max(2, 2 * round(side * scale / 2)) for side in (width, height))  # type: ignore[return-value]


def frame_rate(root: Path, row: ManifestRow) -> Fraction:
    """Frames a second, about: training asks for frames by their number alone."""
    if row.codec == JPEG_FRAMES:
        return _PLAIN_RATE
    video = encoded_video(root, row)
    try:
        with open_video(video) as container:
            rate = container.streams.video[0].average_rate
    except av.FFmpegError as error:
        raise BadClip(f"{video.name}: does not open ({error.strerror or error})") from error
    if not rate or not 1 <= rate <= 240:
        return _PLAIN_RATE
    return Fraction(rate).limit_denominator(1001)


def scaled_pictures(root: Path, row: ManifestRow, size: tuple[int, int]) -> Iterator[Image]:
    """Every frame of a clip as (width, height) `size`, in the order in which it is shown. Raises BadClip when there are more or
    fewer than the row says."""
    if row.codec == JPEG_FRAMES:
        frames = _frames_of_jpeg(frame_bytes(root, row, number) for number in range(row.num_frames))
        return _scaled(str(root / row.path), frames, row, size)
    return pictures_of_video(encoded_video(root, row), row, size)


def pictures_of_video(video: EncodedVideo, row: ManifestRow, size: tuple[int, int]) -> Iterator[Image]:
    return _scaled(video.name, _frames_of_video(video), row, size)


def _scaled(name: str, frames: Iterator[av.VideoFrame], row: ManifestRow, size: tuple[int, int]) -> Iterator[Image]:
    if row.rotation % 90:
        raise BadClip(f"{name}: turned by {row.rotation} degrees, which is no quarter turn")
    turned = row.rotation // 90 % 4
    width, height = reversed(size) if turned % 2 else size
    count = 0
    for frame in frames:
        count += 1
        if count > row.num_frames:
            break
        image_HWC = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC", threads=1)
        yield np.ascontiguousarray(np.rot90(image_HWC, turned))
    if count != row.num_frames:
        more = "more" if count > row.num_frames else f"{count}"
        raise BadClip(f"{name}: {more} frames, not the {row.num_frames} of its manifest")


def _frames_of_video(video: EncodedVideo) -> Iterator[av.VideoFrame]:
    try:
        with open_video(video) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            yield from container.decode(stream)
    except av.FFmpegError as error:
        raise BadClip(f"{video.name}: does not decode ({error.strerror or error})") from error


def _frames_of_jpeg(encoded: Iterator[tuple[str, bytes]]) -> Iterator[av.VideoFrame]:
    from pipelines.decoding.jpeg import decode_jpeg_bytes  # loads torch, which videos do without

    for name, content in encoded:
        image_CHW = decode_jpeg_bytes(name, content)
        yield av.VideoFrame.from_ndarray(np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy()), format="rgb24")

"""Open a video with PyAV, from a file or from memory."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.errors import BadClip

MAX_PIXELS = 1 << 24
"""The largest image, 4096 x 4096. 16 such frames take 805 MB per decoding process, and a file of a few kB can hold larger ones."""


@dataclass(frozen=True)
class EncodedVideo:
    """A video that is not decoded yet."""

    name: str
    """Its name in messages."""
    suffix: str
    """File name suffix of its container (`.mp4`), in lower case."""
    source: Path | NDArray[np.uint8]
    """Its file, or its bytes if it is in a shard."""


def open_video(video: EncodedVideo) -> Any:
    """Open a PyAV container."""
    if isinstance(video.source, Path):
        return av.open(str(video.source))
    # FFmpeg recognizes the container format by its content.
    return av.open(io.BytesIO(video.source))  # type: ignore[arg-type]


@contextmanager
def video_stream(video: EncodedVideo) -> Iterator[tuple[Any, Any]]:
    """Open PyAV's `(container, stream)` of the first video stream, with one thread, since each process decodes its own clips.

    Raises BadClip if no video stream can be decoded, or if its images exceed MAX_PIXELS. If a later frame exceeds it, FFmpeg
    raises an error.
    """
    with open_video(video) as container:
        if not container.streams.video:
            raise BadClip(f"{video.name}: no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise BadClip(f"{video.name}: FFmpeg has no decoder for its video: a damaged header, or a rare codec")
        check_pixels(video.name, stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, stream


def check_pixels(name: str, width: int, height: int) -> None:
    """Raise BadClip for images of more than MAX_PIXELS, whose frames could take all memory of the machine."""
    if width * height > MAX_PIXELS:
        raise BadClip(f"{name}: images of {width}x{height}, more than {MAX_PIXELS} pixels. Fix: scale the clip down")

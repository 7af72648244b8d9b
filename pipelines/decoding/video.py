"""A video, in a file or in memory, as PyAV opens it."""

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


@dataclass(frozen=True)
class EncodedVideo:
    name: str
    """What it is called in messages."""
    suffix: str
    """How a file of its container ends (`.mp4`), in lower case."""
    source: Path | NDArray[np.uint8]
    """Its file, or its bytes where they are a part of a shard."""


def open_video(video: EncodedVideo) -> Any:
    """PyAV's container."""
    if isinstance(video.source, Path):
        return av.open(str(video.source))
    return av.open(io.BytesIO(video.source))  # type: ignore[arg-type]  # FFmpeg knows a container by its bytes


MAX_PIXELS = 1 << 24
"""Of a picture, 4096 x 4096: 16 frames of that are 805 MB in each process that decodes, and a few kB of file can ask for more."""


@contextmanager
def video_stream(video: EncodedVideo) -> Iterator[tuple[Any, Any]]:
    """`(container, stream)` of PyAV, for one thread, since each process has clips of its own.

    Raises BadClip where there is no video stream that decodes, or where its pictures are larger than MAX_PIXELS; FFmpeg ends with
    an error where they become so later.
    """
    with open_video(video) as container:
        if not container.streams.video:
            raise BadClip(f"{video.name}: no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise BadClip(
                f"{video.name}: its video is of no codec that FFmpeg knows here: damaged in its head, or a rare one"
            )
        check_pixels(video.name, stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, stream


def check_pixels(name: str, width: int, height: int) -> None:
    """Raises BadClip for a picture larger than MAX_PIXELS, whose frames could take all of the machine's memory."""
    if width * height > MAX_PIXELS:
        raise BadClip(f"{name}: pictures of {width}x{height}, more than {MAX_PIXELS} pixels: scale them down first")

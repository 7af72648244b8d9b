"""Open a video with PyAV, from a file or from memory, and decode it by the one rule of what is a usable clip."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

from pipelines.errors import BadClip

MAX_PIXELS = 1 << 24
"""The largest image, 4096 x 4096. 16 such frames take 805 MB per decoding process, and a file of a few kB can hold larger ones."""
TIMED_FORMATS = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"))
"""FFmpeg's names of the containers that store each frame's display time, whatever the file's name."""


@dataclass(frozen=True)
class EncodedVideo:
    """A video that is not decoded yet."""

    name: str
    """Its name in messages."""
    source: Path | NDArray[np.uint8]
    """Its file, or its bytes if it is in a shard."""


def open_video(video: EncodedVideo) -> Any:
    """Open a PyAV container. FFmpeg recognizes the format by its content."""
    if isinstance(video.source, Path):
        return av.open(str(video.source))
    return av.open(io.BytesIO(video.source))  # type: ignore[arg-type]


@contextmanager
def video_stream(video: EncodedVideo) -> Iterator[tuple[Any, Any]]:
    """Open PyAV's `(container, stream)` of the video, with one thread, since each process decodes its own clips.

    The video is the first video stream that is no cover image. Raises BadClip if there is none that can be decoded, or if its
    images exceed MAX_PIXELS. If a later frame exceeds it, FFmpeg raises an error.
    """
    with open_video(video) as container:
        streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
        if not streams:
            raise BadClip(f"{video.name}: no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise BadClip(f"{video.name}: FFmpeg has no decoder for its video: a damaged header, or a rare codec")
        check_pixels(video.name, stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, stream


def usable_frames(name: str, container: Any, stream: Any) -> Iterator[Any]:
    """Decode the frames in display order. Raises BadClip at the first frame that makes the clip unusable.

    The scan, `verify --decode`, transcoding and training all decode by this rule. Frames must be intact and of one size. In
    TIMED_FORMATS their times must rise: a stream with a damaged head may decode out of order, and then decoders disagree on
    which frame is frame 7. Other containers need not store each frame's time.
    """
    size, last_pts = None, None
    has_times = container.format.name in TIMED_FORMATS
    for number, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise BadClip(f"{name}: frame {number} is corrupt")
        if has_times and last_pts is not None and frame.pts is not None and frame.pts <= last_pts:
            raise BadClip(f"{name}: damaged: frame {number} has an earlier display time than frame {number - 1}")
        size, last_pts = size or (frame.width, frame.height), frame.pts
        if (frame.width, frame.height) != size:
            raise BadClip(
                f"{name}: frame {number} is {frame.width}x{frame.height}, the first frame {size[0]}x{size[1]}. "
                "Fix: encode the clip again with one size"
            )
        yield frame


def check_pixels(name: str, width: int, height: int) -> None:
    """Raise BadClip for images of more than MAX_PIXELS, whose frames could take all memory of the machine."""
    if width * height > MAX_PIXELS:
        raise BadClip(f"{name}: images of {width}x{height}, more than {MAX_PIXELS} pixels. Fix: scale the clip down")

"""What a video file really holds: decoded once from end to end, as containers are often wrong about their own length."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pipelines.decoding.video import EncodedVideo, video_stream
from pipelines.errors import BadClip, MissingClip


@dataclass(frozen=True)
class ClipFacts:
    """The fields of a manifest's row that the file, or the folder of frames, decides."""

    length: int
    """Bytes of the file, or of all frames."""
    num_frames: int
    """Frames that decode, whatever the container claims."""
    codec: str
    width: int
    height: int
    """As stored, before any rotation."""
    rotation: int
    """Degrees, 0 to 359, counter-clockwise, by which a player turns the stored picture to show it."""


_TIMED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # FFmpeg's names; decode.py has their endings


def check_regular(path: Path, mode: int) -> None:
    """Raises BadClip for what is no file, by its `st_mode`: opening a pipe would wait for ever."""
    if not stat.S_ISREG(mode):
        raise BadClip(f"{path}: no regular file, but a folder, a pipe, a socket or a device")


def scan_clip(path: str | Path) -> ClipFacts:
    """Decode every frame of the first video stream; BadClip where that is not possible.

    A stream that is damaged in its head may decode to frames in another order than they are shown in, and then no two
    decoders mean the same by "frame 7": bad as well. Only MP4 and Matroska are asked for that, as others need not hold the time
    at which each frame is shown.
    """
    path = Path(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise MissingClip(f"{path}: no such file") from None
    check_regular(path, status.st_mode)
    return scan_video(EncodedVideo(str(path), path.suffix.lower(), path), status.st_size)


def scan_video(video: EncodedVideo, length: int) -> ClipFacts:
    """Like `scan_clip`, of a video of `length` bytes wherever it is."""
    path = video.name
    if length == 0:
        raise BadClip(f"{path}: the file is empty")
    try:
        with video_stream(video) as (container, stream):
            num_frames, rotation, last_pts = 0, 0, None
            has_times = container.format.name in _TIMED_FORMATS
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise BadClip(f"{path}: frame {num_frames} is corrupt")
                if has_times and last_pts is not None and frame.pts is not None and frame.pts <= last_pts:
                    raise BadClip(f"{path}: frame {num_frames} is to be shown before frame {num_frames - 1}: damaged")
                last_pts = frame.pts
                rotation = int(frame.rotation) % 360 if num_frames == 0 else rotation
                num_frames += 1
            codec, width, height = stream.codec_context.name, stream.codec_context.width, stream.codec_context.height
    except BadClip:
        raise
    except Exception as error:  # a decoder fails in as many ways as a file can be broken
        raise BadClip(f"{path}: does not decode ({getattr(error, 'strerror', None) or error})") from error
    if num_frames == 0:
        raise BadClip(f"{path}: holds no frame")
    if rotation % 90:
        raise BadClip(f"{path}: turned by {rotation} degrees, which is no quarter turn")
    return ClipFacts(length, num_frames, codec, width, height, rotation)

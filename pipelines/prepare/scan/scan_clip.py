"""Scan a video file: decode it once from end to end, because containers are often wrong about their own length."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.decoding.video import EncodedVideo, video_stream
from pipelines.errors import BadClip, MissingClip


@dataclass(frozen=True)
class ClipFacts:
    """The fields of a manifest row that follow from the file, or the folder of frames."""

    length: int
    """Bytes of the file, or of all frames."""
    num_frames: int
    """Number of frames that decode, whatever the container claims."""
    codec: str
    width: int
    height: int
    """As stored, before any rotation."""
    rotation: int
    """Degrees, 0 to 359, counter-clockwise, by which a player turns the stored frames for display."""
    colour_space: str = ""
    colour_range: str = ""
    """The first frame's, as FFmpeg names them."""


_COLOUR_SPACES = {
    0: "gbr",
    1: "bt709",
    4: "fcc",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020nc",
    10: "bt2020c",
    11: "smpte2085",
    12: "chroma-derived-nc",
    13: "chroma-derived-c",
    14: "ictcp",
}
"""FFmpeg's names of the matrices of ITU-T H.273, table 4."""
_COLOUR_RANGES = {1: "tv", 2: "pc"}

# FFmpeg's names of the containers whose suffixes decoding/decode.py lists.
_TIMED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")


def check_regular(path: Path, mode: int) -> None:
    """Raise BadClip unless `mode` (`st_mode`) is a regular file's: opening a pipe would block forever."""
    if not stat.S_ISREG(mode):
        raise BadClip(f"{path}: not a regular file, but a folder, a pipe, a socket or a device")


def scan_clip(path: str | Path) -> ClipFacts:
    """Decode every frame of the first video stream. Raises BadClip when one does not decode.

    Frames out of display order are bad too. A stream with a damaged head may decode that way, and then decoders disagree on
    which frame is frame 7. Only MP4 and Matroska are checked: other containers need not store each frame's display time.
    """
    path = Path(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise MissingClip(f"{path}: no such file") from None
    check_regular(path, status.st_mode)
    return scan_video(EncodedVideo(str(path), path.suffix.lower(), path), status.st_size)


def scan_video(video: EncodedVideo, length: int) -> ClipFacts:
    """Scan a video of `length` bytes, in a file or in memory, as `scan_clip` does."""
    path = video.name
    if length == 0:
        raise BadClip(f"{path}: the file is empty")
    try:
        with video_stream(video) as (container, stream):
            num_frames, rotation, last_pts, colours = 0, 0, None, ("", "")
            has_times = container.format.name in _TIMED_FORMATS
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise BadClip(f"{path}: frame {num_frames} is corrupt")
                if has_times and last_pts is not None and frame.pts is not None and frame.pts <= last_pts:
                    raise BadClip(
                        f"{path}: damaged: frame {num_frames} has an earlier display time than frame {num_frames - 1}"
                    )
                last_pts = frame.pts
                if num_frames == 0:
                    rotation, colours = int(frame.rotation) % 360, colours_of(frame)
                num_frames += 1
            codec, width, height = stream.codec_context.name, stream.codec_context.width, stream.codec_context.height
    except BadClip:
        raise
    # Decoders raise exceptions of many types for broken files.
    except Exception as error:
        raise BadClip(f"{path}: does not decode ({getattr(error, 'strerror', None) or error})") from error
    if num_frames == 0:
        raise BadClip(f"{path}: contains no frame")
    if rotation % 90:
        raise BadClip(f"{path}: rotated by {rotation} degrees, which is not a multiple of 90")
    return ClipFacts(length, num_frames, codec, width, height, rotation, *colours)


def colours_of(frame: Any) -> tuple[str, str]:
    """Return FFmpeg's names of the (colour space, colour range) of a PyAV frame; `unknown` where the stream does not say."""
    return _COLOUR_SPACES.get(int(frame.colorspace), "unknown"), _COLOUR_RANGES.get(int(frame.color_range), "unknown")

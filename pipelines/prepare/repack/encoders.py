"""Encode a clip with PyAV's encoders: 8-bit 4:2:0, no sound, one frame per image.

Each encoder runs on one thread, because many processes encode at once. There are no B-frames, so packets are in the order of
the frames, and no container needs an edit list. Colours are BT.601, which decoders that ignore tags assume for small videos.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.jpeg_clips import JPEG_FRAMES

Image = NDArray[np.uint8]
"""(H, W, 3), RGB; both sides even."""

# FFmpeg's numbers for colour spaces and ranges. BT.601's matrix is `bt470bg`.
_BT601, _SMPTE170M, _LIMITED, _FULL = 5, 6, 1, 2


@dataclass(frozen=True)
class Encoder:
    """An FFmpeg encoder and its options, given by `options(quality, gop)`. A lower quality number is better and larger."""

    name: str
    codec: str
    """FFmpeg's name of the decoder, as in a manifest."""
    suffix: str
    container: str
    options: Callable[[int, int], dict[str, str]]
    quality: int
    worst: int
    pix_fmt: str = "yuv420p"
    least_side: int = 2
    """Pixels. x265 writes out of bounds for images less than 64 wide (seen in PyAV 18.1)."""

    @property
    def colours(self) -> tuple[str, str]:
        """The (colour space, colour range) of its clips, as FFmpeg names them."""
        return "bt470bg", "pc" if self.pix_fmt == "yuvj420p" else "tv"


def _h264(quality: int, gop: int) -> dict[str, str]:
    """Turn off the deblocking filter and CABAC, which take most of the decoding time (benchmarks/input.py)."""
    speed = {"tune": "fastdecode", "bf": "0", "threads": "1"}
    return {"crf": str(quality), "g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"} | speed


def _hevc(quality: int, gop: int) -> dict[str, str]:
    params = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:pools=none:frame-threads=1:log-level=none"
    return {"crf": str(quality), "x265-params": params}


def _vp9(quality: int, gop: int) -> dict[str, str]:
    common = {"g": str(gop), "keyint_min": str(gop), "threads": "1", "row-mt": "0"}
    return {"crf": str(quality), "b": "0", "cpu-used": "4"} | common


def _jpeg(quality: int, gop: int) -> dict[str, str]:
    return {"qmin": str(quality), "qmax": str(quality)}


ENCODERS = {
    "h264": Encoder("libx264", "h264", ".mp4", "mp4", _h264, quality=20, worst=51),
    "hevc": Encoder("libx265", "hevc", ".mp4", "mp4", _hevc, quality=22, worst=51, least_side=64),
    "vp9": Encoder("libvpx-vp9", "vp9", ".webm", "webm", _vp9, quality=28, worst=63),
    "mjpeg": Encoder("mjpeg", "mjpeg", ".mp4", "mp4", _jpeg, quality=3, worst=31, pix_fmt="yuvj420p"),
    "jpeg": Encoder("mjpeg", JPEG_FRAMES, "", "", _jpeg, quality=3, worst=31, pix_fmt="yuvj420p"),
}
"""By the value of `--codec`; `jpeg` makes a JPEG file per frame, the others one video."""


def encode_video(encoder: Encoder, images: Iterator[Image], rate: Fraction, quality: int, gop: int) -> bytes:
    """Encode a complete video file with `rate` frames per second. Raises av.FFmpegError."""
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
    """Yield each image as JPEG. Raises av.FFmpegError."""
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
    """Set size and colours before the first image is encoded; `stream` is an output stream or a codec context."""
    stream.height, stream.width = image_HWC.shape[:2]
    stream.pix_fmt = encoder.pix_fmt
    context = getattr(stream, "codec_context", stream)
    context.thread_count = 1
    context.colorspace, context.color_primaries, context.color_trc = _BT601, _SMPTE170M, _SMPTE170M
    context.color_range = _FULL if encoder.pix_fmt == "yuvj420p" else _LIMITED


def _frame(image_HWC: Image, encoder: Encoder) -> Any:
    frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24")
    return frame.reformat(format=encoder.pix_fmt, dst_colorspace=_BT601, threads=1)

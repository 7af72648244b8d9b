"""Draw predictions on frames, and write them as a video."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from runtime.atomic_write import atomic_write

Write = Callable[[float, NDArray[np.uint8]], None]

LEAST_SIDE = 240
_TIME_BASE = Fraction(1, 90_000)
_BACKGROUND, _BAR, _TEXT = (0, 0, 0, 150), (46, 134, 222, 200), (255, 255, 255, 255)


def annotate(image_HWC: NDArray[np.uint8], scores: Mapping[str, float], status: str) -> NDArray[np.uint8]:
    """Return the RGB image with a bar per class, as long as its score, and a status line below them.

    An image with a side of less than LEAST_SIDE is enlarged by a whole factor, so that the text leaves something to see. A text
    that is wider than the image gets a smaller font.
    """
    image = Image.fromarray(image_HWC)
    factor = math.ceil(LEAST_SIDE / min(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BILINEAR)
    line = max(12, image.height // 16)
    layer = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(layer)

    def write(number: int, text: str) -> None:
        size, room = line * 0.75, image.width - 2 * (line // 3)
        width = ImageFont.load_default(size).getlength(text)
        font = ImageFont.load_default(max(1.0, size * min(1.0, room / max(1.0, width))))
        draw.text((line // 3, number * line), text, font=font, fill=_TEXT)

    draw.rectangle((0, 0, image.width, line * (len(scores) + 1)), fill=_BACKGROUND)
    for number, (name, score) in enumerate(scores.items()):
        top = number * line
        draw.rectangle((0, top + 1, score * image.width, top + line - 1), fill=_BAR)
        write(number, f"{score:4.0%}  {name}")
    write(len(scores), status)
    return np.asarray(Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB"))


@contextmanager
def video_writer(path: Path, fps: float) -> Iterator[Write]:
    """Yield a function that appends an RGB image at a time in seconds to an H.264 file, which appears when the block ends.

    Images have the size of the first one; an odd last row or column is left out. Times must not fall.
    """
    stream: Any = None
    first_s, last_pts = 0.0, -1
    with atomic_write(path, durable=False) as file, av.open(file, "w", format="mp4") as container:

        def write(time_s: float, image_HWC: NDArray[np.uint8]) -> None:
            nonlocal stream, first_s, last_pts
            height, width = (side // 2 * 2 for side in image_HWC.shape[:2])
            if stream is None:
                rate = Fraction(fps).limit_denominator(1001)
                stream = container.add_stream("libx264", rate=rate, options={"crf": "23", "preset": "veryfast"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.time_base = _TIME_BASE
                first_s = time_s
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC[:height, :width]), format="rgb24")
            last_pts = max(last_pts + 1, round((time_s - first_s) / _TIME_BASE))
            frame.pts, frame.time_base = last_pts, _TIME_BASE
            container.mux(stream.encode(frame))

        yield write
        if stream is not None:
            container.mux(stream.encode(None))

"""A video, in a file or in memory, as PyAV opens it."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray


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

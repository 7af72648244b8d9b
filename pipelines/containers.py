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
    return av.open(_NamedBytes(video.source, f"clip{video.suffix}"))


class _NamedBytes(io.BytesIO):
    """FFmpeg looks at a file's name, too, to find out what it is."""

    def __init__(self, content: NDArray[np.uint8], name: str) -> None:
        super().__init__(content)  # type: ignore[arg-type]
        self.name = name

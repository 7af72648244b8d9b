"""torchcodec, which seeks to a frame instead of decoding all frames before it. Loads FFmpeg's libraries.

It finds frame i by the time of the i-th packet, while PyAV, with which the manifest is made, counts frames. The scan finds out
in which files both give the same frames (the manifest's `fast_seek`).
"""

from pathlib import Path
from typing import Any

import torch
from torchcodec.decoders import VideoDecoder

from .video import EncodedVideo


def open_fast(video: EncodedVideo) -> Any:
    """Open a `VideoDecoder`. It makes frames upright, but does not mirror. Raises RuntimeError or ValueError."""
    source = str(video.source) if isinstance(video.source, Path) else torch.from_numpy(video.source)
    # One thread, because each process decodes its own clips. seek_mode="exact", because "approximate" computes times from the
    # average frame rate, which gives wrong frames at variable rates.
    return VideoDecoder(source, seek_mode="exact", num_ffmpeg_threads=1)


def has_size(decoder: Any, num_frames: int, width: int, height: int) -> bool:
    """Tell whether the clip has this many frames of this stored size, as far as its header says."""
    shown = sorted((decoder.metadata.width or 0, decoder.metadata.height or 0))
    return len(decoder) == num_frames and shown == sorted((width, height))

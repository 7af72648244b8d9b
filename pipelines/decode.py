"""Chosen frames of an encoded clip as pixels: torchcodec where FFmpeg's libraries are installed, PyAV everywhere else."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .manifest import ManifestRow
from .scan import BadClip

# path, frame indices (T,), rotation in degrees -> uint8 (T, 3, H, W), upright
Decoder = Callable[[Path, NDArray[np.int64], int], Tensor]


def decode_clip(decoder: str, root: Path, row: ManifestRow, frame_T: NDArray[np.int64]) -> Tensor:
    """The frames `frame_T` of the clip that a manifest's row describes, uint8 (T, 3, H, W), upright; `root`: its folder.

    Raises BadClip, which says what is wrong, when the file is missing, not as long as the row says, or cannot be decoded.
    """
    path = root / row.path
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise BadClip(f"{path}: {error.strerror}") from error
    if size != row.length:
        raise BadClip(f"{path}: {size} bytes, but {row.length} when the manifest was made: truncated or replaced since")
    try:
        video_TCHW = _DECODERS[decoder](path, frame_T, row.rotation)
    except BadClip:
        raise
    except Exception as error:  # a decoder fails in as many ways as a file can be broken
        raise BadClip(f"{path}: {decoder} cannot decode it: {error}") from error
    if len(video_TCHW) != len(frame_T):
        raise BadClip(f"{path}: {decoder} gave {len(video_TCHW)} of {len(frame_T)} frames")
    return video_TCHW


@cache
def choose_decoder(wanted: str = "auto") -> str:
    """`torchcodec` or `pyav`: what `wanted` says, or for `auto` the faster one that works on this machine.

    Raises ValueError with the remedy when the decoder asked for is not usable.
    """
    if wanted not in ("auto", *_DECODERS):
        raise ValueError(f"pipeline.decoder must be one of auto, {', '.join(_DECODERS)}, got {wanted!r}")
    if wanted == "pyav":
        return wanted
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        if wanted == "torchcodec":
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"pipeline.decoder=torchcodec does not load here ({reason}). "
                "Fix: install FFmpeg's libraries (apt-get install ffmpeg) and torchcodec, or use pipeline.decoder=pyav"
            ) from error
        return "pyav"
    return "torchcodec"


def _decode_torchcodec(path: Path, frame_T: NDArray[np.int64], rotation: int) -> Tensor:
    from torchcodec.decoders import VideoDecoder  # loads FFmpeg: only where it was chosen

    # One thread, because each worker process decodes clips of its own. Exact, because the approximate mode turns an index
    # into a time by the average frame rate: other frames, where the rate varies. torchcodec turns video upright itself.
    decoder = VideoDecoder(str(path), seek_mode="exact", num_ffmpeg_threads=1)
    return decoder.get_frames_at(frame_T.tolist()).data


def _decode_pyav(path: Path, frame_T: NDArray[np.int64], rotation: int) -> Tensor:
    wanted = set(frame_T.tolist())
    last = max(wanted)
    pixels_HWC = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                pixels_HWC[index] = frame.to_ndarray(format="rgb24")
            if index == last:
                break
    missing = wanted - pixels_HWC.keys()
    if missing:
        raise BadClip(f"{path}: frame {min(missing)} is not there: truncated, or the manifest is of another file")
    video_THWC = np.stack([pixels_HWC[index] for index in frame_T.tolist()])
    upright_THWC = np.rot90(video_THWC, rotation // 90, axes=(1, 2))
    return torch.from_numpy(np.ascontiguousarray(upright_THWC)).permute(0, 3, 1, 2)


_DECODERS: dict[str, Decoder] = {"torchcodec": _decode_torchcodec, "pyav": _decode_pyav}

"""Chosen frames of a clip as pixels: of videos by torchcodec where FFmpeg's libraries are installed, else by PyAV; of folders
of JPEG files by torchvision."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.errors import BadClip
from pipelines.manifest import JPEG_FRAMES, ManifestRow

from .clip_bytes import frame_at, from_nearest, video_at
from .jpeg import check_picture, decode_jpeg_bytes, jpeg_size
from .video import EncodedVideo, video_stream

# the clip, its row, frame indices (T,) -> uint8 (T, 3, H, W), upright
Decoder = Callable[[EncodedVideo, ManifestRow, NDArray[np.int64]], Tensor]


def decode_clip(decoder: str, root: Path, row: ManifestRow, frame_T: NDArray[np.int64]) -> Tensor:
    """The frames `frame_T` of the clip that a manifest's row describes, uint8 (T, 3, H, W), upright; `root`: its folder.

    `decoder` is for videos; a row says itself that its clip is kept as JPEG pictures. Raises BadClip, which says what is
    wrong, when the clip is missing, not as long as the row says, or cannot be decoded.
    """
    return from_nearest(root, row, lambda path: _decode_at(path, decoder, row, frame_T))


def _decode_at(path: Path, decoder: str, row: ManifestRow, frame_T: NDArray[np.int64]) -> Tensor:
    if row.codec == JPEG_FRAMES:
        return _decode_jpeg_frames(path, row, frame_T)
    video = video_at(path, row)
    try:
        video_TCHW = _DECODERS[decoder](video, row, frame_T)
    except BadClip:
        raise
    except Exception as error:  # a decoder fails in as many ways as a file can be broken
        raise BadClip(f"{video.name}: {decoder} cannot decode it: {error}") from error
    if len(video_TCHW) != len(frame_T):
        raise BadClip(f"{video.name}: {decoder} gave {len(video_TCHW)} of {len(frame_T)} frames")
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


def _decode_torchcodec(video: EncodedVideo, row: ManifestRow, frame_T: NDArray[np.int64]) -> Tensor:
    """torchcodec finds frame i by the time of the i-th packet; PyAV, which made the manifest, counts. PyAV decodes where the
    two could differ: containers without a time for each frame (AVI, MPEG), and files with packets that show no frame (the
    hidden reference frames of VP8, damage)."""
    from torchcodec.decoders import VideoDecoder  # loads FFmpeg: only where it was chosen

    if video.suffix in _TIMED_CONTAINERS:
        with suppress(RuntimeError, ValueError, IndexError):
            # One thread, because each worker process decodes clips of its own. Exact, because the approximate mode turns an
            # index into a time by the average frame rate: other frames, where the rate varies. It turns video upright itself.
            source = str(video.source) if isinstance(video.source, Path) else torch.from_numpy(video.source)
            decoder = VideoDecoder(source, seek_mode="exact", num_ffmpeg_threads=1)
            shown = sorted((decoder.metadata.width or 0, decoder.metadata.height or 0))
            # Of pictures of another size, which may take any amount of memory, none is decoded before PyAV has looked.
            if len(decoder) == row.num_frames and shown == sorted((row.width, row.height)):
                return decoder.get_frames_at(frame_T.tolist()).data
    return _decode_pyav(video, row, frame_T)


def _decode_pyav(video: EncodedVideo, row: ManifestRow, frame_T: NDArray[np.int64]) -> Tensor:
    wanted = set(frame_T.tolist())
    last = max(wanted)
    pixels_HWC = {}
    with video_stream(video) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                check_picture(video.name, frame.width, frame.height, row)
                pixels_HWC[index] = frame.to_ndarray(format="rgb24")
            if index == last:
                break
    missing = wanted - pixels_HWC.keys()
    if missing:
        raise BadClip(f"{video.name}: frame {min(missing)} is not there: truncated, or the manifest is of another file")
    video_THWC = np.stack([pixels_HWC[index] for index in frame_T.tolist()])
    upright_THWC = np.rot90(video_THWC, row.rotation // 90, axes=(1, 2))
    return torch.from_numpy(np.ascontiguousarray(upright_THWC)).permute(0, 3, 1, 2)


def _decode_jpeg_frames(path: Path, row: ManifestRow, frame_T: NDArray[np.int64]) -> Tensor:
    """Only the frames that are asked for are read, each once; their size is checked, the bytes of the rest are not."""
    images_HWC = {}
    for index in sorted(set(frame_T.tolist())):
        name, content = frame_at(path, row, index)
        check_picture(name, *jpeg_size(name, content), row)
        images_HWC[index] = decode_jpeg_bytes(name, content).permute(1, 2, 0)  # as it lies in memory: copied at once
    return torch.stack([images_HWC[index] for index in frame_T.tolist()]).permute(0, 3, 1, 2)


_TIMED_CONTAINERS = frozenset((".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm"))
_DECODERS: dict[str, Decoder] = {"torchcodec": _decode_torchcodec, "pyav": _decode_pyav}

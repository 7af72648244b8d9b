"""Decode chosen frames of a clip to pixels.

Videos: torchcodec if FFmpeg's libraries are installed, else PyAV. Folders of JPEG files: torchvision.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.errors import BadClip
from pipelines.jpeg_clips import JPEG_FLOW, JPEG_FLOW_RG
from pipelines.manifest import ManifestRow

from .clip_bytes import image_at, video_at
from .jpeg import check_image_size, decode_jpeg_bytes, jpeg_size
from .orientation import upright
from .staged_copies import NoCandidateError, candidates
from .video import EncodedVideo, usable_frames, video_stream

# (video, its row, frame indices (T,)) -> uint8 (T, 3, H, W), upright
Decoder = Callable[[EncodedVideo, ManifestRow, NDArray[np.int64]], Tensor]


def decode_clip(decoder: str, root: Path, row: ManifestRow, frame_T: NDArray[np.int64]) -> Tensor:
    """Decode the frames `frame_T` of a row's clip, uint8 (T, C, H, W), upright; `root`: the manifest's folder.

    Frames have three channels (RGB), flow fields two (x, y). `decoder` is for videos; JPEG images need none. Raises BadClip, with
    the reason, if the clip is missing, differs from its row, or does not decode.
    """
    for candidate in candidates(root, row):
        with candidate as path:
            return _decode_at(path, decoder, row, frame_T)
    raise NoCandidateError


def _decode_at(path: Path, decoder: str, row: ManifestRow, frame_T: NDArray[np.int64]) -> Tensor:
    if row.is_images:
        return _decode_images(path, row, frame_T)
    video = video_at(path, row)
    try:
        video_TCHW = _DECODERS[decoder](video, row, frame_T)
    except BadClip:
        raise
    # Decoders raise many kinds of exception on broken files.
    except Exception as error:
        raise BadClip(f"{video.name}: {decoder} cannot decode it: {error}") from error
    if len(video_TCHW) != len(frame_T):
        raise BadClip(f"{video.name}: {decoder} gave {len(video_TCHW)} of {len(frame_T)} frames")
    return video_TCHW


@cache
def choose_decoder(wanted: str = "auto") -> str:
    """Choose `torchcodec` or `pyav`: the one named by `wanted`, or for `auto` the faster one that works on this machine.

    Raises ValueError, with the fix, if `wanted` cannot be used.
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
    """Decode with torchcodec the files in which the scan has found its frames to be PyAV's, and the others with PyAV."""
    if row.fast_seek:
        # Loads FFmpeg, so only if torchcodec was chosen.
        from .fast_decoder import has_size, open_fast

        with suppress(RuntimeError, ValueError, IndexError):
            decoder = open_fast(video)
            # Frames of another size could take any amount of memory; PyAV checks each frame's size first.
            if has_size(decoder, row.num_frames, row.width, row.height):
                return decoder.get_frames_at(frame_T.tolist()).data
    return _decode_pyav(video, row, frame_T)


def _decode_pyav(video: EncodedVideo, row: ManifestRow, frame_T: NDArray[np.int64]) -> Tensor:
    wanted = set(frame_T.tolist())
    last = max(wanted)
    pixels_HWC = {}
    with video_stream(video) as (container, stream):
        for index, frame in enumerate(usable_frames(video.name, container, stream)):
            if index in wanted:
                check_image_size(video.name, frame.width, frame.height, row)
                pixels_HWC[index] = frame.to_ndarray(format="rgb24")
            if index == last:
                break
    missing = wanted - pixels_HWC.keys()
    if missing:
        raise BadClip(f"{video.name}: frame {min(missing)} is missing: truncated, or not the file of the manifest")
    video_THWC = upright(np.stack([pixels_HWC[index] for index in frame_T.tolist()]), row)
    return torch.from_numpy(np.ascontiguousarray(video_THWC)).permute(0, 3, 1, 2)


def _decode_images(path: Path, row: ManifestRow, frame_T: NDArray[np.int64]) -> Tensor:
    """Decode JPEG images. Reads and checks those of each wanted frame once, and no others."""
    frames_HWC = {index: _frame_of_images(path, row, index) for index in sorted(set(frame_T.tolist()))}
    return torch.stack([frames_HWC[index] for index in frame_T.tolist()]).permute(0, 3, 1, 2)


def _frame_of_images(path: Path, row: ManifestRow, index: int) -> Tensor:
    """Decode a frame or a flow field, (H, W, C): as torchvision lays pixels out in memory, so `stack` needs no transpose."""
    if row.codec == JPEG_FLOW:
        return torch.cat([_image(path, row, image, grey=True) for image in row.images_of(index)], dim=-1)
    image_HWC = _image(path, row, row.images_of(index)[0])
    return image_HWC[..., :2] if row.codec == JPEG_FLOW_RG else image_HWC


def _image(path: Path, row: ManifestRow, image: int, grey: bool = False) -> Tensor:
    name, content = image_at(path, row, image)
    check_image_size(name, *jpeg_size(name, content), row)
    return decode_jpeg_bytes(name, content, grey).permute(1, 2, 0)


_DECODERS: dict[str, Decoder] = {"torchcodec": _decode_torchcodec, "pyav": _decode_pyav}

"""The DALI pipeline: decoding, crops, resizing and flips as one graph, the same for CPU and GPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .dali_batches import FRAMES, GREY_IMAGES, PER_IMAGE, VIDEOS, EncodedClip

# Batches that DALI prepares while the current one is trained on.
_PREFETCH_BATCHES = 2

Samples = tuple[list[NDArray[Any]], ...]
"""One batch of inputs: a list per input of the graph, with one array per sample."""


class DaliError(RuntimeError):
    """DALI is not installed or cannot do what is asked; the message gives the fix."""


@cache
def import_dali() -> Any:
    """Import `nvidia.dali`. Raises DaliError, with the fix, if it does not load."""
    try:
        import nvidia.dali as dali
    except (ImportError, OSError) as error:
        raise DaliError(
            f"pipeline=dali needs NVIDIA DALI, which does not load here ({error}). Fix: pip install nvidia-dali-cuda130 "
            "(-cuda120 for CUDA 12), or pipeline=torch"
        ) from error
    return dali


def make_pipeline(kind: str, device: torch.device, threads: int, samples: int, source: Callable[[], Samples]) -> Any:
    """Build the DALI pipeline for batches of at most `samples` samples, which it prefetches from `source`.

    Inputs: content (see EncodedSource), start (2,) and shape (2,) of the crop window, size (2,) to scale the window to,
    flip (), and for VIDEOS frames (F,). Outputs: uint8 frames (F, H, W, C), or (H, W, C) of each image; and the shape that the
    frames had before the crop.
    """
    dali = import_dali()
    fn, types = dali.fn, dali.types
    pipeline = dali.Pipeline(
        batch_size=samples,
        num_threads=threads,
        device_id=_device_id(device),
        prefetch_queue_depth=_PREFETCH_BATCHES,
    )
    with pipeline:
        content, start, shape, size, flip, *frames = _inputs(dali, kind, source)
        video = _decoded(dali, kind, device, content, frames)
        # Some versions of DALI leave the layout empty.
        video = fn.reshape(video, layout="HWC" if kind in PER_IMAGE else "FHWC")
        # "pad", because frames smaller than the manifest says must not break the pipeline: the loader checks their shape.
        crop = fn.slice(video, start, shape, axis_names="HW", out_of_bounds_policy="pad")
        scaled = fn.resize(crop, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.flip(scaled, horizontal=flip), video.shape(device="cpu"))
    pipeline.build()
    return pipeline


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _inputs(dali: Any, kind: str, source: Callable[[], Samples]) -> Any:
    """Declare the graph's inputs, in the order of `Samples`."""
    types = dali.types
    inputs = [
        (types.UINT8, 4 if kind == FRAMES else 1),
        (types.INT32, 1),
        (types.INT32, 1),
        (types.FLOAT, 1),
        (types.INT32, 0),
    ]
    inputs += [(types.INT32, 1)] * (kind == VIDEOS)
    dtype, ndim = zip(*inputs, strict=True)
    return dali.fn.external_source(
        source=source, num_outputs=len(inputs), batch=True, dtype=list(dtype), ndim=list(ndim)
    )


def _decoded(dali: Any, kind: str, device: torch.device, content: Any, frames: list[Any]) -> Any:
    on_gpu = device.type == "cuda"
    decoder_device = "mixed" if on_gpu else "cpu"
    if kind == VIDEOS:
        # pad_mode="none": a video shorter than the manifest says must fail, not repeat its last frame.
        return dali.fn.decoders.video(content, frames=frames[0], pad_mode="none", device=decoder_device)
    if kind in PER_IMAGE:
        # Versions after 2.1.0 would turn an image by its EXIF data; the loader turns clips by their manifest row.
        turns = dali.backend.GetSchema("decoders__Image").HasArgument("adjust_orientation")
        as_stored = {"adjust_orientation": False} if turns else {}
        colours = dali.types.GRAY if kind == GREY_IMAGES else dali.types.RGB
        return dali.fn.decoders.image(content, output_type=colours, device=decoder_device, **as_stored)
    return content.gpu() if on_gpu else content


def samples_of(kind: str, clips: list[EncodedClip], parts: list[list[NDArray[np.uint8]]]) -> Samples:
    """Make the graph's inputs for these clips: each part with the operations to apply to it."""
    samples = []
    for clip, contents in zip(clips, parts, strict=True):
        # A turned clip is mirrored after the turns, by the loader.
        mirror = clip.flip and clip.quarter_turns == 0
        top, left, height, width = clip.window
        operations = [
            np.array([top, left], np.int32),
            np.array([height, width], np.int32),
            np.array(clip.size, np.float32),
            np.array(mirror, np.int32),
        ]
        operations += [clip.frame_F] * (kind == VIDEOS)
        samples += [(content, *operations) for content in contents]
    return tuple(list(values) for values in zip(*samples, strict=True))


def error_reason(error: Exception) -> str:
    """Extract the reason from a DALI error, which also has the operator's name and a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [at for at, line in enumerate(lines) if at and lines[at - 1].startswith("encountered")]
    reason = lines[after[0] if after else 0 :]
    if not reason:
        return type(error).__name__
    # CUDA's errors have a second line: "CUDA driver API error CUDA_ERROR_INVALID_VALUE (1):" and "invalid argument".
    return " ".join(reason[: 2 if reason[0].endswith(":") else 1])

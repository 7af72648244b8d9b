"""The DALI pipeline: decoding, crops and flips as one graph."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .dali_batches import FRAMES, IMAGES, VIDEOS, EncodedClip

_BATCHES_AHEAD = 2  # that DALI works on while one is trained on


Samples = tuple[list[NDArray[Any]], ...]
"""Of one batch, one list for each input of the graph."""


class DaliError(RuntimeError):
    """DALI is not there, or cannot do what it is asked to; the message says how to mend it."""


@cache
def import_dali() -> Any:
    """The module `nvidia.dali`. Raises DaliError with the remedy."""
    try:
        import nvidia.dali as dali
    except (ImportError, OSError) as error:
        raise DaliError(
            f"pipeline=dali needs NVIDIA DALI, which does not load here ({error}). Fix: pip install nvidia-dali-cuda130 "
            "(-cuda120 for CUDA 12), or pipeline=torch"
        ) from error
    return dali


def make_pipeline(kind: str, device: torch.device, threads: int, samples: int, source: Callable[[], Samples]) -> Any:
    """DALI's graph, built, for batches of at most so many samples, which it takes from `source` ahead of their use.

    Inputs: content (as EncodedSource gives it), start (2,) and shape (2,) of the window that is cut out, size (2,) that this is
    scaled to, flip (), and of VIDEOS frames (F,). Outputs: uint8 frames (F, H, W, C), or (H, W, C) of IMAGES; and what shape
    they had before anything was cut out.
    """
    dali = import_dali()
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"
    decoder_device = "mixed" if on_gpu else "cpu"
    pipeline = dali.Pipeline(
        batch_size=samples,
        num_threads=threads,
        device_id=(torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None,
        prefetch_queue_depth=_BATCHES_AHEAD,
    )
    with pipeline:
        inputs = [
            (types.UINT8, 4 if kind == FRAMES else 1),
            (types.INT32, 1),
            (types.INT32, 1),
            (types.FLOAT, 1),
            (types.INT32, 0),
        ]
        inputs += [(types.INT32, 1)] * (kind == VIDEOS)
        dtype, ndim = zip(*inputs, strict=True)
        content, start, shape, size, flip, *frames = fn.external_source(
            source=source, num_outputs=len(inputs), batch=True, dtype=list(dtype), ndim=list(ndim)
        )
        if kind == VIDEOS:
            # Without padding: a video that is shorter than the manifest says must not pass for one that ends in a still.
            video = fn.decoders.video(content, frames=frames[0], pad_mode="none", device=decoder_device)
        elif kind == IMAGES:
            video = fn.decoders.image(content, output_type=types.RGB, device=decoder_device)
        else:
            video = content.gpu() if on_gpu else content
        video = fn.reshape(video, layout="HWC" if kind == IMAGES else "FHWC")  # some versions leave it empty
        # Frames of another size than the manifest says are found by their shape, and must not break the pipeline.
        cut = fn.slice(video, start, shape, axis_names="HW", out_of_bounds_policy="pad")
        scaled = fn.resize(cut, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.flip(scaled, horizontal=flip), video.shape(device="cpu"))
    pipeline.build()
    return pipeline


def samples_of(kind: str, clips: list[EncodedClip], parts: list[list[NDArray[np.uint8]]]) -> Samples:
    """What the graph is fed with for these clips: each of their parts, with what is to be done with it."""
    samples = []
    for clip, contents in zip(clips, parts, strict=True):
        mirror = clip.flip and clip.quarter_turns == 0  # else it is mirrored once it is upright
        top, left, height, width = clip.window
        todo = [
            np.array([top, left], np.int32),
            np.array([height, width], np.int32),
            np.array(clip.size, np.float32),
            np.array(mirror, np.int32),
        ]
        todo += [clip.frame_F] * (kind == VIDEOS)
        samples += [(content, *todo) for content in contents]
    return tuple(list(values) for values in zip(*samples, strict=True))


def _reason(error: Exception) -> str:
    """What DALI says behind the name of the operator and its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [line for at, line in enumerate(lines) if at and lines[at - 1].startswith("encountered")]
    return (after or lines or [type(error).__name__])[0]

"""Loaders that turn a clip's file into the pixels of a training step: ours and those of other projects, on the same samples.

A loader takes (root, rows, samples) of a batch and returns uint8 (N, T, 3, SIDE, SIDE), possibly in another layout. The other
projects also normalise to float on the CPU; this is omitted here, in their favour. Each of them is reimplemented here from how
its project decodes and scales.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipelines.decoding.decode import decode_clip
from pipelines.loading.clips import ClipSource
from pipelines.manifest import ManifestRow, image_file
from pipelines.stream.augmentation import Augmentation, SampleParams

SIDE = 224
AUGMENTATION = Augmentation(num_frames=8, size=SIDE, flip="on")

Way = Callable[[Path, list[ManifestRow], list[SampleParams]], Any]


def ours(decoder: str) -> Way:
    def batch(root: Path, rows: list[ManifestRow], samples: list[SampleParams]) -> Tensor:
        source = _source(root, decoder)
        return torch.stack([source.pixels(row, params, SIDE) for row, params in zip(rows, samples, strict=True)])

    return batch


@cache
def _source(root: Path, decoder: str) -> ClipSource:
    """Open the manifest once, as a worker process does."""
    return ClipSource(root / "train.arrow", decoder)


def decode_alone(decoder: str) -> Way:
    """Return a loader that only decodes: the lower bound of `ours`."""

    def batch(root: Path, rows: list[ManifestRow], samples: list[SampleParams]) -> list[Tensor]:
        return [decode_clip(decoder, root, row, params.frame_T) for row, params in zip(rows, samples, strict=True)]

    return batch


def pytorchvideo(root: Path, rows: list[ManifestRow], samples: list[SampleParams]) -> Tensor:
    """Decode all frames with PyAV, take the sampled ones (its encoded_video, UniformTemporalSubsample) and scale with torch."""
    videos = []
    for row, params in zip(rows, samples, strict=True):
        with av.open(str(root / row.path)) as container:
            container.streams.video[0].thread_count = 1
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        video_TCHW = torch.from_numpy(np.stack([frames[index] for index in params.frame_T])).permute(0, 3, 1, 2)
        videos.append(_scaled_by_torch(cut(video_TCHW, params)))
    return torch.stack(videos)


def mmaction2(root: Path, rows: list[ManifestRow], samples: list[SampleParams]) -> Tensor:
    """Decode with decord and scale each frame with OpenCV (its DecordDecode, MultiScaleCrop, Resize and Flip)."""
    import cv2
    import decord

    cv2.setNumThreads(1)
    videos = []
    for row, params in zip(rows, samples, strict=True):
        reader = decord.VideoReader(str(root / row.path), num_threads=1)
        images = reader.get_batch(params.frame_T.tolist()).asnumpy()
        cuts = [
            image[params.top : params.top + params.height, params.left : params.left + params.width] for image in images
        ]
        scaled = [cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR) for image in cuts]
        video_THWC = np.stack([cv2.flip(image, 1) for image in scaled] if params.flip else scaled)
        videos.append(torch.from_numpy(video_THWC.transpose(0, 3, 1, 2)))
    return torch.stack(videos)


def torchvision_and_torchcodec(root: Path, rows: list[ManifestRow], samples: list[SampleParams]) -> Tensor:
    """Decode and scale as both document: torchcodec's approximate seek mode and torchvision's transforms v2."""
    from torchcodec.decoders import VideoDecoder
    from torchvision.transforms.v2 import functional

    videos = []
    for row, params in zip(rows, samples, strict=True):
        decoder = VideoDecoder(str(root / row.path), seek_mode="approximate", num_ffmpeg_threads=1)
        video_TCHW = decoder.get_frames_at(params.frame_T.tolist()).data
        place = (params.top, params.left, params.height, params.width)
        scaled_TCHW = functional.resized_crop(video_TCHW, *place, [SIDE, SIDE], antialias=True)
        videos.append(functional.horizontal_flip(scaled_TCHW) if params.flip else scaled_TCHW)
    return torch.stack(videos)


def pillow_frames(root: Path, rows: list[ManifestRow], samples: list[SampleParams]) -> Tensor:
    """Load folders of JPEG files with Pillow, as the official TSM code does."""
    from PIL import Image

    videos = []
    for row, params in zip(rows, samples, strict=True):
        images = []
        for index in params.frame_T.tolist():
            image = Image.open(image_file(root / row.path, row, index)).convert("RGB")
            place = (params.left, params.top, params.left + params.width, params.top + params.height)
            image = image.crop(place).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            images.append(np.array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if params.flip else image))
        videos.append(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    return torch.stack(videos)


def dali(root: Path, rows: list[ManifestRow], samples: list[SampleParams]) -> Any:
    """Run DALI's CPU operators in one graph with one thread, as in pipelines/loading/dali_graph.py.

    This is not the project's DALI loader: that would prefetch during the other loaders' turns. DALI decodes every frame and
    keeps the sampled ones.
    """
    graph = _dali_graph(len(rows))
    graph.feed_input("data", [np.fromfile(root / row.path, dtype=np.uint8) for row in rows])
    graph.feed_input("frame_T", [params.frame_T.astype(np.int32) for params in samples])
    graph.feed_input("corner", [np.array([params.top, params.left], dtype=np.int32) for params in samples])
    graph.feed_input("shape", [np.array([params.height, params.width], dtype=np.int32) for params in samples])
    graph.feed_input("flip", [np.array(params.flip, dtype=np.int32) for params in samples])
    (videos,) = graph.run()
    return videos


@cache
def _dali_graph(batch: int) -> Any:
    import nvidia.dali

    fn: Any = nvidia.dali.fn
    types: Any = nvidia.dali.types
    graph: Any = nvidia.dali.Pipeline(
        batch_size=batch, num_threads=1, device_id=None, exec_async=False, exec_pipelined=False, prefetch_queue_depth=1
    )
    with graph:
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        frame_T = fn.external_source(name="frame_T", dtype=types.INT32, ndim=1)
        corner, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("corner", "shape"))
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        video = fn.decoders.video(data, frames=frame_T, pad_mode="edge", device="cpu")
        video = fn.reshape(video, layout="FHWC")
        video = fn.slice(video, start=corner, shape=shape, axis_names="HW")
        video = fn.resize(video, size=[SIDE, SIDE], interp_type=types.INTERP_LINEAR, antialias=True)
        video = fn.crop_mirror_normalize(video, mirror=flip, dtype=types.UINT8, output_layout="FCHW")
        graph.set_outputs(video)
    graph.build()
    return graph


def cut(video_TCHW: Tensor, params: SampleParams) -> Tensor:
    crop_TCHW = video_TCHW[:, :, params.top : params.top + params.height, params.left : params.left + params.width]
    return crop_TCHW.flip(-1) if params.flip else crop_TCHW


def _scaled_by_torch(video_TCHW: Tensor) -> Tensor:
    """Scale as float32, as PyTorchVideo's transforms do."""
    return interpolate(video_TCHW.float(), (SIDE, SIDE), mode="bilinear").byte()


OURS = "ours, torchcodec"
RAW_WAYS: dict[str, Way] = {
    OURS: ours("torchcodec"),
    "its decoding alone": decode_alone("torchcodec"),
    "ours, PyAV": ours("pyav"),
    "torchvision + torchcodec": torchvision_and_torchcodec,
    "PyTorchVideo's (PyAV)": pytorchvideo,
    "mmaction2's (decord, OpenCV)": mmaction2,
    "DALI's CPU operators": dali,
}

"""NVIDIA DALI decodes and augments whole batches: on the GPU (NVDEC, nvJPEG) or, by the same graph, on the CPU.

What is decoded, cut, scaled and mirrored is decided outside of DALI, by the draws that all loaders share; DALI keeps no state
that a resumed run would need. What differs between the two devices is the operators' `device`, and nothing else.

Shapes: N clips, F frames, S samples of DALI's batch (a video is one sample; of a clip of JPEG frames each frame is one).
"""

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .encoded import FRAMES, IMAGES, VIDEOS, EncodedBatch, EncodedClip, EncodedClips, EncodedSource
from .loader import ClipBatch, ClipLoader, EvaluationClips, TrainingClips, cut_views
from .manifest import JPEG_FRAMES, Manifest
from .scan import BadClip

_BATCHES_AHEAD = 2  # that DALI works on while one is trained on
_FAILURES_IN_A_ROW = 3  # of batches in which no clip is bad
_ROWS_TRIED = 5  # of each codec, before DALI is held not to know it

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


@dataclass(frozen=True)
class Feed:
    """What DALI is fed with: VIDEOS or IMAGES of these codecs, while clips of others are decoded to the end on the host; or, where
    it knows none of a manifest's codecs, FRAMES that the host has decoded."""

    kind: str
    codecs: frozenset[str]
    others: dict[str, str]
    """Codecs that the host decodes, and why."""


@cache
def choose_feed(manifest_path: Path, device: torch.device) -> Feed:
    """Find out what DALI can decode on this device by having it decode a clip of each codec that the manifest has.

    Which codecs those are depends on its version and, on GPUs, on the chip. Raises DaliError where DALI is not there.
    """
    import_dali()
    manifest = Manifest.open(manifest_path)
    counts = manifest.codecs()
    reasons = {codec: _why_not(manifest, codec, device) for codec in counts}
    others = {codec: reason for codec, reason in reasons.items() if reason is not None}
    known = frozenset(counts) - frozenset(others)
    if not known:
        return Feed(FRAMES, frozenset(counts), others)
    pictures = known & {JPEG_FRAMES}
    videos = known - pictures
    many_pictures = sum(counts[codec] for codec in pictures) > sum(counts[codec] for codec in videos)
    chosen, lesser = (pictures, videos) if many_pictures else (videos, pictures)
    others |= dict.fromkeys(lesser, "one graph decodes videos or pictures, and there are fewer of these")
    return Feed(IMAGES if many_pictures else VIDEOS, chosen, others)


def describe(feed: Feed, device: torch.device, decoder: str) -> str:
    """One line for the log."""
    dali = f"DALI {import_dali().__version__}"
    why = "; ".join(f"{codec} ({reason})" for codec, reason in feed.others.items())
    if feed.kind == FRAMES:
        return (
            f"{dali} knows none of these codecs on {device.type}: {why}. {decoder} decodes on the host, DALI augments. Other "
            "versions know others, and prepare.py transcode makes one that is known"
        )
    line = f"{dali} decodes {', '.join(sorted(feed.codecs))} on {device.type}"
    return f"{line}; on the host, by {decoder}: {why}" if why else line


def _why_not(manifest: Manifest, codec: str, device: torch.device) -> str | None:
    """Why DALI cannot decode a codec; None when it can."""
    kind = IMAGES if codec == JPEG_FRAMES else VIDEOS
    source = EncodedSource(manifest.path, "", kind, frozenset([codec]))
    reason = "no clip of it could be read"
    for index in manifest.rows_of(codec, _ROWS_TRIED):
        try:
            clip = source.first_frame(manifest.row(index))
        except BadClip:
            continue
        samples = samples_of(kind, [clip], [clip.parts])
        try:
            make_pipeline(kind, device, 1, 1, lambda: samples).run()  # noqa: B023  (called here, and not later)
        except RuntimeError as error:
            reason = _reason(error)
            continue
        return None
    return reason


class DaliLoader:
    """Yields the ClipBatch of each item of a plan, in order, as ClipLoader does, with pixels on `device`.

    `workers` processes read what DALI is fed with, and decode what it does not know. A batch that DALI cannot decode is decoded
    on the host, where a clip that is bad is found and replaced by the dataset's rule; DALI begins anew behind it.
    """

    def __init__(
        self, dataset: TrainingClips | EvaluationClips, workers: int, prefetch: int, device: torch.device, threads: int
    ) -> None:
        self._dataset, self._device, self._threads = dataset, device, threads
        source = dataset.source
        self._feed = choose_feed(source.manifest_path, device)
        encoded = EncodedSource(source.manifest_path, source.decoder, self._feed.kind, self._feed.codecs)
        self._host = ClipLoader(EncodedClips(replace(dataset, source=encoded)), workers, prefetch)

    def batches(self, plan: Iterable[Any]) -> Iterator[ClipBatch]:
        """Batches of the plan's items. Raises WorkerLostError, and DaliError when DALI fails and no clip is to blame."""
        encoded = self._host.batches(plan)
        failures = 0
        again = list(islice(encoded, 1))
        while again:
            run = _Run(self._feed.kind, chain(again, encoded), self._pipeline_for(again[0]))
            for batch, outputs in run.results():
                if outputs is not None or not batch.shapes:
                    yield self._clip_batch(batch, outputs)
                    failures = 0
                    continue
                on_host = self._on_host(batch)
                failures = 0 if on_host.bad_clips else failures + 1
                if failures == _FAILURES_IN_A_ROW:
                    raise DaliError(
                        f"DALI failed in {failures} batches in a row in which no clip is bad: {run.failure}. Fix: pipeline=torch"
                    )
                yield on_host
            again = [*run.fed, *islice(encoded, 1)]
            if again:
                del run
                gc.collect()  # what a failed pipeline was fed with, in shared memory, hangs on to objects of DALI in cycles

    def _pipeline_for(self, first: EncodedBatch) -> Callable[[Callable[[], Samples]], Any]:
        """Makes the pipeline for batches of as many clips as this one, around what feeds it."""
        dataset = self._dataset
        frames = 1
        if self._feed.kind == IMAGES and isinstance(dataset, TrainingClips):
            frames = dataset.augmentation.num_frames
        elif self._feed.kind == IMAGES and isinstance(dataset, EvaluationClips):
            frames = dataset.protocol.views * dataset.protocol.num_frames  # or fewer, as views share frames
        samples = len(first.clips) * frames
        return lambda source: make_pipeline(self._feed.kind, self._device, self._threads, samples, source)

    def _clip_batch(self, batch: EncodedBatch, outputs: tuple[Any, Any] | None) -> ClipBatch:
        """From DALI's outputs, and from the pixels that the host has for the other clips."""
        decoded = batch.decodable()
        videos: Iterator[Tensor] = iter(())
        if outputs is not None:
            if not _as_expected(batch, decoded, outputs[1]):
                return self._on_host(batch)
            pixels = _whole(outputs[0], self._device)
            if pixels is not None and _is_plain(batch, decoded):
                if self._feed.kind == IMAGES:
                    pixels = pixels.unflatten(0, (len(decoded), -1))
                return batch.with_pixels(pixels.permute(0, 1, 4, 2, 3))  # the view costs nothing, and is channels_last
            videos = self._finished(batch, decoded, outputs[0])
        clips = [next(videos) if isinstance(clip, EncodedClip) else clip.to(self._device) for clip in batch.clips]
        video = torch.stack(clips)
        return batch.with_pixels(video.flatten(0, 1) if isinstance(self._dataset, EvaluationClips) else video)

    def _finished(self, batch: EncodedBatch, decoded: list[EncodedClip], output: Any) -> Iterator[Tensor]:
        """Upright and mirrored, (T, 3, H, W), or (V, T, 3, H, W) of an evaluation's views, clip by clip."""
        at = 0
        for clip, parts in zip(decoded, batch.shapes, strict=True):
            samples = [_to_torch(output[at + number], self._device) for number in range(len(parts))]
            at += len(parts)
            frames_FHWC = torch.stack(samples) if self._feed.kind == IMAGES else samples[0]
            frames_FCHW = frames_FHWC.permute(0, 3, 1, 2)
            if clip.quarter_turns:
                frames_FCHW = frames_FCHW.rot90(clip.quarter_turns, (2, 3))
                frames_FCHW = frames_FCHW.flip(-1) if clip.flip else frames_FCHW
            yield cut_views(frames_FCHW, clip.frame_F, clip.views) if clip.views else frames_FCHW

    def _on_host(self, batch: EncodedBatch) -> ClipBatch:
        """The same batch as the torch loader makes it: from the same clips, with bad ones found and replaced."""
        made = self._dataset[batch.item]
        return replace(made, video_NTCHW=made.video_NTCHW.to(self._device))


class _Run:
    """Feeds one pipeline, and pairs what comes out with what went in; a pipeline that has failed cannot go on."""

    def __init__(
        self, kind: str, batches: Iterator[EncodedBatch], make: Callable[[Callable[[], Samples]], Any]
    ) -> None:
        self._kind, self._batches = kind, batches
        self.fed: deque[EncodedBatch] = deque()
        """Taken, and not yet in a result."""
        self.failure = ""
        self._raised: Exception | None = None
        self._pipeline = make(self._next_samples)

    def results(self) -> Iterator[tuple[EncodedBatch, tuple[Any, Any] | None]]:
        """Each batch with its outputs: None when it has nothing for DALI, or when DALI has failed with it, which is the end."""
        try:
            while True:
                try:
                    outputs = self._pipeline.run()
                except StopIteration:
                    break
                except Exception as error:
                    if self._raised is not None:
                        raise self._raised from None
                    yield from self._without_samples()
                    self.failure = _reason(error)
                    yield self.fed.popleft(), None
                    return
                yield from self._without_samples()
                yield self.fed.popleft(), outputs
            yield from self._without_samples()
        finally:
            self._pipeline = (
                None  # which knows this object: apart they end now, with their threads and memory on the GPU
            )

    def _without_samples(self) -> Iterator[tuple[EncodedBatch, None]]:
        while self.fed and not self.fed[0].shapes:
            yield self.fed.popleft(), None

    def _next_samples(self) -> Samples:
        """DALI asks for the next batch; StopIteration says that there is none."""
        while True:
            try:
                batch = next(self._batches)
            except StopIteration:
                raise
            except Exception as error:  # of the processes that read; through DALI it would come as another
                self._raised = error
                raise
            self.fed.append(batch)
            if batch.shapes:
                return samples_of(self._kind, batch.decodable(), batch.parts())


def _is_plain(batch: EncodedBatch, decoded: list[EncodedClip]) -> bool:
    """Nothing is left to do but to look at DALI's output as the batch."""
    return len(decoded) == len(batch.clips) and not any(clip.quarter_turns or clip.views for clip in decoded)


def _as_expected(batch: EncodedBatch, decoded: list[EncodedClip], shapes: Any) -> bool:
    """Are all frames as large as the manifest says?"""
    height_width = [tuple(np.array(shape)[-3:-1].tolist()) for shape in shapes]
    expected = [clip.stored for clip, parts in zip(decoded, batch.shapes, strict=True) for _ in range(len(parts))]
    return height_width == expected


def _whole(output: Any, device: torch.device) -> Tensor | None:
    """DALI's batch as one tensor; None when its samples differ in shape."""
    shapes = output.shape()
    return _to_torch(output.as_tensor(), device) if all(shape == shapes[0] for shape in shapes) else None


def _to_torch(output: Any, device: torch.device) -> Tensor:
    """A copy of DALI's pixels, because DALI uses its memory again."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    if device.type != "cuda":
        return feed_ndarray(output, torch.empty(output.shape(), dtype=torch.uint8))
    # feed_ndarray only queues the copy. Behind the steps that torch's stream holds it could come after DALI has given the memory
    # to another batch. On a stream of its own it is done at once, as `run` has waited for the pixels, and waiting for it is cheap.
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        pixels = torch.empty(output.shape(), dtype=torch.uint8, device=device)
        feed_ndarray(output, pixels, cuda_stream=stream)
    stream.synchronize()
    pixels.record_stream(torch.cuda.current_stream(device))
    return pixels


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _reason(error: Exception) -> str:
    """What DALI says behind the name of the operator and its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [line for at, line in enumerate(lines) if at and lines[at - 1].startswith("encountered")]
    return (after or lines or [type(error).__name__])[0]

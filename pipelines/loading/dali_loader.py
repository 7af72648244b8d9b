"""NVIDIA DALI decodes and augments whole batches: on the GPU (NVDEC, nvJPEG) or, by the same graph, on the CPU.

What is decoded, cut, scaled and mirrored is decided outside of DALI, by the draws that all loaders share; DALI keeps no state
that a resumed run would need. What differs between the two devices is the operators' `device`, and nothing else.

Shapes: N clips, F frames, S samples of DALI's batch (a video is one sample; of a clip of JPEG frames each frame is one).
"""

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .clips import ClipBatch, EvaluationClips, TrainingClips, cut_views
from .dali_batches import IMAGES, EncodedBatch, EncodedClip, EncodedClips, EncodedSource
from .dali_graph import DaliError, Samples, _reason, make_pipeline, samples_of
from .dali_support import choose_feed
from .worker_loader import ClipLoader

_FAILURES_IN_A_ROW = 3  # of batches in which no clip is bad


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
            # The pipeline refers to this object. Without the cycle both end now, with their threads and GPU memory.
            self._pipeline = None

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

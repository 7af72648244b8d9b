"""Load batches with NVIDIA DALI: it decodes and augments whole batches, on the GPU (NVDEC, nvJPEG) or on the CPU.

The sample parameters, which all loaders share, decide what DALI decodes, crops, scales and mirrors. DALI itself uses no
random numbers, so it has no state to checkpoint. CPU and GPU use the same graph and differ only in the operators' `device`.

Shapes: N clips, F frames of a clip, S samples of DALI's batch (a video is one sample, each JPEG image is one).
"""

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.stream.modality import CHANNELS_PER_FRAME, FLOW, FRAMES_PER_SEGMENT

from .clips import ClipBatch, EvaluationClips, TrainingClips, cut_views, invert_x, stack_segments
from .dali_batches import GREY_IMAGES, PER_IMAGE, EncodedBatch, EncodedClip, EncodedClips, EncodedSource
from .dali_graph import DaliError, Samples, error_reason, make_pipeline, samples_of
from .dali_support import choose_feed
from .worker_loader import ClipLoader

# Consecutive failed batches without a bad clip before DALI itself counts as broken.
_MAX_FAILURES = 3


class DaliLoader:
    """Yields the ClipBatch of each batch index, in order, as ClipLoader does, with pixels on `device`.

    `workers` processes read DALI's inputs, and decode the codecs that DALI does not. If DALI fails on a batch, the host
    decodes that batch, finds its bad clip and replaces it by the dataset's rule; a new pipeline continues after it.
    """

    def __init__(
        self,
        dataset: TrainingClips | EvaluationClips,
        workers: int,
        prefetch: int,
        device: torch.device,
        threads: int,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self._dataset, self._device, self._threads = dataset, device, threads
        self._sampling = dataset.augmentation if isinstance(dataset, TrainingClips) else dataset.protocol
        source = dataset.source
        self._feed = choose_feed(source.manifest_path, device)
        feed = self._feed
        encoded = EncodedSource(
            source.manifest_path, source.decoder, source.retry_s, feed=feed.kind, codecs=feed.codecs
        )
        self._host = ClipLoader(EncodedClips(replace(dataset, source=encoded)), workers, prefetch, warn=warn)

    def batches(self, batch_indices: Iterable[Any]) -> Iterator[ClipBatch]:
        """Load one batch per index. Raises WorkerLostError, and DaliError if DALI keeps failing without a bad clip."""
        encoded = self._host.batches(batch_indices)
        failures = 0
        pending = list(islice(encoded, 1))
        while pending:
            run = _Run(self._feed.kind, chain(pending, encoded), self._pipeline_for(pending[0]))
            for batch, outputs in run.results():
                if outputs is not None or not batch.shapes:
                    yield self._clip_batch(batch, outputs)
                    failures = 0
                    continue
                on_host = self._on_host(batch)
                failures = 0 if on_host.bad_clips else failures + 1
                if failures == _MAX_FAILURES:
                    raise DaliError(
                        f"DALI failed on {failures} batches in a row in which no clip is bad: {run.failure}. Fix: pipeline=torch"
                    )
                yield on_host
            pending = [*run.fed, *islice(encoded, 1)]
            if pending:
                # Reference cycles through DALI's objects keep a failed pipeline's inputs, in shared memory, alive.
                del run
                gc.collect()

    def _pipeline_for(self, first: EncodedBatch) -> Callable[[Callable[[], Samples]], Any]:
        """Return a function that makes a pipeline, given its source, for batches as large as this one."""
        dataset = self._dataset
        samples = len(first.clips)
        if self._feed.kind in PER_IMAGE:
            # An upper bound: views may share frames.
            views = dataset.protocol.views if isinstance(dataset, EvaluationClips) else 1
            images = 2 if self._feed.kind == GREY_IMAGES else 1
            samples *= views * self._sampling.num_frames * FRAMES_PER_SEGMENT[self._sampling.modality] * images
        return lambda source: make_pipeline(self._feed.kind, self._device, self._threads, samples, source)

    def _clip_batch(self, batch: EncodedBatch, outputs: tuple[Any, Any] | None) -> ClipBatch:
        """Make a ClipBatch from DALI's outputs and the pixels of the clips that the host decoded."""
        decoded = batch.decodable()
        videos: Iterator[Tensor] = iter(())
        if outputs is not None:
            if not _has_manifest_sizes(batch, decoded, outputs[1]):
                return self._on_host(batch)
            pixels = _as_one_tensor(outputs[0], self._device)
            if pixels is not None and _is_finished(batch, decoded):
                return batch.with_pixels(self._whole_batch(pixels, decoded))
            videos = self._finished(batch, decoded, outputs[0], pixels)
        clips = [next(videos) if isinstance(clip, EncodedClip) else clip.to(self._device) for clip in batch.clips]
        video = torch.stack(clips)
        return batch.with_pixels(video.flatten(0, 1) if isinstance(self._dataset, EvaluationClips) else video)

    def _whole_batch(self, pixels: Tensor, decoded: list[EncodedClip]) -> Tensor:
        """Arrange the pixels of a training batch, (N, T, C, H, W): of RGB a view, without a copy, in channels_last order."""
        if self._feed.kind in PER_IMAGE:
            pixels = pixels.unflatten(0, (len(decoded), -1))
        video_NTCHW = stack_segments(self._frames_of(pixels))
        for video_TCHW, clip in zip(video_NTCHW, decoded, strict=True):
            if clip.flip and self._sampling.modality == FLOW:
                invert_x(video_TCHW)
        return video_NTCHW

    def _finished(
        self, batch: EncodedBatch, decoded: list[EncodedClip], output: Any, pixels: Tensor | None
    ) -> Iterator[Tensor]:
        """Turn, mirror and cut DALI's frames clip by clip: (T, C, H, W), or (V, T, C, H, W) for an evaluation's views.

        `pixels`: the whole output, if its samples have the same shape.
        """
        at = 0
        for clip, parts in zip(decoded, batch.shapes, strict=True):
            if pixels is not None:
                samples = list(pixels[at : at + len(parts)])
            else:
                samples = [_to_torch(output[at + number], self._device) for number in range(len(parts))]
            at += len(parts)
            frames_FCHW = self._frames_of(torch.stack(samples) if self._feed.kind in PER_IMAGE else samples[0])
            if clip.quarter_turns:
                frames_FCHW = frames_FCHW.rot90(clip.quarter_turns, (2, 3))
                frames_FCHW = frames_FCHW.flip(-1) if clip.flip else frames_FCHW
            if clip.views:
                yield cut_views(frames_FCHW, clip.frame_F, clip.views)
            else:
                yield stack_segments(frames_FCHW, clip.flip)

    def _frames_of(self, pixels_PHWC: Tensor) -> Tensor:
        """View DALI's pixels (..., P, H, W, C), which have a part per image or per frame, as frames (..., F, C, H, W)."""
        if self._feed.kind == GREY_IMAGES:
            return pixels_PHWC.squeeze(-1).unflatten(-3, (-1, CHANNELS_PER_FRAME[FLOW]))
        # A colour image with x and y has a third channel.
        channels = CHANNELS_PER_FRAME[self._sampling.modality]
        return pixels_PHWC.movedim(-1, -3)[..., :channels, :, :]

    def _on_host(self, batch: EncodedBatch) -> ClipBatch:
        """Load the same batch without DALI, as the torch loader does, finding and replacing bad clips."""
        loaded = self._dataset[batch.batch_index]
        return replace(loaded, video_NTCHW=loaded.video_NTCHW.to(self._device))


class _Run:
    """Feeds one pipeline and pairs its outputs with its inputs. A pipeline that has failed cannot continue."""

    def __init__(
        self, kind: str, batches: Iterator[EncodedBatch], make: Callable[[Callable[[], Samples]], Any]
    ) -> None:
        self._kind, self._batches = kind, batches
        self.fed: deque[EncodedBatch] = deque()
        """Batches taken and not yet yielded."""
        self.failure = ""
        self._raised: Exception | None = None
        self._pipeline = make(self._next_samples)

    def results(self) -> Iterator[tuple[EncodedBatch, tuple[Any, Any] | None]]:
        """Yield each batch with DALI's outputs: None if it has no input for DALI, or if DALI failed on it, which ends the run."""
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
                    self.failure = error_reason(error)
                    yield self.fed.popleft(), None
                    return
                yield from self._without_samples()
                yield self.fed.popleft(), outputs
            yield from self._without_samples()
        finally:
            # Breaks the reference cycle with the pipeline, which frees its threads and GPU memory now.
            self._pipeline = None

    def _without_samples(self) -> Iterator[tuple[EncodedBatch, None]]:
        while self.fed and not self.fed[0].shapes:
            yield self.fed.popleft(), None

    def _next_samples(self) -> Samples:
        """Give DALI its next inputs. Raises StopIteration after the last."""
        while True:
            try:
                batch = next(self._batches)
            except StopIteration:
                raise
            except Exception as error:
                # An error of the workers. DALI would raise another in its place, so `results` raises this one.
                self._raised = error
                raise
            self.fed.append(batch)
            if batch.shapes:
                return samples_of(self._kind, batch.decodable(), batch.parts())


def _is_finished(batch: EncodedBatch, decoded: list[EncodedClip]) -> bool:
    """Tell whether DALI's output is the whole batch, with no turns or views left to do."""
    return len(decoded) == len(batch.clips) and not any(clip.quarter_turns or clip.views for clip in decoded)


def _has_manifest_sizes(batch: EncodedBatch, decoded: list[EncodedClip], shapes: Any) -> bool:
    """Tell whether all frames have the size that the manifest says."""
    height_width = [tuple(np.array(shape)[-3:-1].tolist()) for shape in shapes]
    expected = [clip.stored for clip, parts in zip(decoded, batch.shapes, strict=True) for _ in range(len(parts))]
    return height_width == expected


def _as_one_tensor(output: Any, device: torch.device) -> Tensor | None:
    """Copy DALI's batch to one tensor; None if its samples differ in shape."""
    shapes = output.shape()
    return _to_torch(output.as_tensor(), device) if all(shape == shapes[0] for shape in shapes) else None


def _to_torch(output: Any, device: torch.device) -> Tensor:
    """Copy DALI's pixels, because DALI reuses its memory."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    if device.type != "cuda":
        return feed_ndarray(output, torch.empty(output.shape(), dtype=torch.uint8))
    # feed_ndarray only enqueues the copy. On torch's current stream it would run after the queued training steps, when DALI may
    # have reused the memory. On a stream of its own it runs at once (`run` has waited for the pixels), so waiting is cheap.
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

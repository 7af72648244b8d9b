"""Evaluate a past-only network on a continuous stream: clips one after another, with caches that are never reset.

Shapes: N clips of the manifest, D frame distances, P percentages of a clip that were seen, R readings of the logits, A clips that
are shown at once, one per stream, T frames, W frames of the longest reading, K classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distributed.backends.base import Backend
from pipelines.loading.clips import BadClipRecord, EvaluationClips
from pipelines.manifest import Manifest
from pipelines.stream.continuous import BEGINNINGS_PERCENT, Shown, frames_seen, lanes_of, rounds_of
from training.build.data import Loader
from training.build.numerics import autocast
from training.config.schema import EvaluationConfig
from tsm.streaming import StreamingNetwork

from .evaluate import dtype_of_logits

READINGS = {"last_frame": 1, "mean_of_4": 4, "mean_of_8": 8}
"""The predicted class is that of the mean over the logits of so many latest frames, whichever clip they belong to."""

LONGEST_READING = max(READINGS.values())


@dataclass(frozen=True)
class StreamAnswers:
    """Classes predicted for every clip, the same on every rank."""

    predicted_NDPR: Tensor
    """int32, on the CPU; 0 for clips that could not be decoded."""
    seen_N: Tensor
    """bool, on the CPU: False for a clip that could not be decoded."""
    missing: list[BadClipRecord]
    """Undecodable clips, of all ranks."""


def frame_counts(manifest: Manifest) -> NDArray[np.int64]:
    """Return the number of frames of each clip."""
    return np.array([manifest.row(row).num_frames for row in range(len(manifest))], dtype=np.int64)


@torch.inference_mode()
def evaluate_stream(
    network: StreamingNetwork,
    normalise: Callable[[Tensor], Tensor],
    clips: EvaluationClips,
    loader: Loader,
    backend: Backend,
    settings: EvaluationConfig,
    progress: Callable[[int], None] = lambda _: None,
) -> StreamAnswers:
    """Show every clip to a stream, at every frame distance; collective. `loader` loads `clips`, whole ones, one per batch index.

    Each rank advances `settings.batch` streams together. A stream shows its own part of the circle of clips
    (pipelines/stream/continuous.py), and before it so many frames that caches and readings hold what they would in one endless
    stream: one frame for each cache, and those of the longest reading. So predictions depend neither on ranks nor on streams.

    An undecodable clip is shown as black frames, and is missing. `progress` receives the number of finished clips and frames.
    """
    manifest, rank, size = clips.source.manifest, backend.topology.rank, backend.topology.size
    burn_in = len(network.initial_caches(1)) + LONGEST_READING - 1
    lanes = lanes_of(frame_counts(manifest), settings.batch * size, max(settings.distances), burn_in)[rank::size]
    frame_size, classes = (clips.protocol.side, clips.protocol.side), len(manifest.classes)
    streams = [
        _Streams(network, normalise, len(lanes), frame_size, classes, backend.device, settings.amp)
        for _ in settings.distances
    ]
    shape = (len(manifest), len(streams), len(BEGINNINGS_PERCENT), len(READINGS))
    predicted_NDPR = torch.zeros(shape, dtype=torch.int32, device=backend.device)
    times_seen_N = torch.zeros(len(manifest), dtype=torch.int32, device=backend.device)
    missing: list[BadClipRecord] = []
    done = count(1)

    def report() -> None:
        progress(next(done))

    for shown_A, clips_A, bad_clips in _loaded(rounds_of(lanes), manifest, loader, report):
        for number, (distance, of_distance) in enumerate(zip(settings.distances, streams, strict=True)):
            lane_A = [shown.lane for shown in shown_A]
            predicted_ATR = of_distance.show(lane_A, [clip[::distance] for clip in clips_A], report)
            for shown, clip, predicted_TR in zip(shown_A, clips_A, predicted_ATR, strict=True):
                if shown.counted:
                    predicted_NDPR[shown.row, number] = predicted_TR[_latest_frames(len(clip), distance)]
        bad_rows = {record.row for record in bad_clips}
        counted = [shown.row for shown in shown_A if shown.counted]
        times_seen_N[[row for row in counted if row not in bad_rows]] += 1
        missing.extend(record for record in bad_clips if record.row in counted)
    backend.all_reduce_(predicted_NDPR, "evaluation.stream")
    backend.all_reduce_(times_seen_N, "evaluation.seen")
    by_rank = backend.all_gather_objects([vars(record) for record in missing])
    missing = [BadClipRecord(**fields) for records in by_rank for fields in records]
    return StreamAnswers(predicted_NDPR.cpu(), times_seen_N.cpu() > 0, missing)


def _latest_frames(num_frames: int, distance: int) -> list[int]:
    """Return, for each percentage of a clip that was seen, the last frame that its stream has shown by then."""
    return [(frames_seen(num_frames, percent) - 1) // distance for percent in BEGINNINGS_PERCENT]


def _loaded(
    rounds: list[list[Shown]], manifest: Manifest, loader: Loader, report: Callable[[], None]
) -> Iterator[tuple[list[Shown], list[Tensor], list[BadClipRecord]]]:
    """Yield each round with the frames of its clips, uint8 (T, 3, H, W), and those that could not be decoded."""
    batches = loader.batches((np.array([shown.row]), np.array([True])) for shown_A in rounds for shown in shown_A)
    for shown_A in rounds:
        clips_A: list[Tensor] = []
        bad_clips: list[BadClipRecord] = []
        for shown, batch in zip(shown_A, batches, strict=False):
            video_TCHW = batch.video_NTCHW[0]
            if batch.bad_clips:
                video_TCHW = video_TCHW[:1].expand(manifest.row(shown.row).num_frames, -1, -1, -1)
                bad_clips.extend(batch.bad_clips)
            clips_A.append(video_TCHW)
            report()
        yield shown_A, clips_A, bad_clips


class _Streams:
    """The streams of one frame distance: the caches and the latest logits of each."""

    def __init__(
        self,
        network: StreamingNetwork,
        normalise: Callable[[Tensor], Tensor],
        count: int,
        frame_size: tuple[int, int],
        classes: int,
        device: torch.device,
        amp: str,
    ) -> None:
        self._network, self._normalise, self._device, self._amp = network, normalise, device, amp
        self._caches = network.initial_caches(count, frame_size)
        dtype = dtype_of_logits(network)
        self._latest_SWK = torch.zeros(count, LONGEST_READING, classes, dtype=dtype, device=device)

    def show(self, stream_A: list[int], clips_A: list[Tensor], report: Callable[[], None]) -> Tensor:
        """Show a clip to each of these streams, and `report` each frame.

        Returns the classes predicted after each frame, (A, T, R); 0 after a clip's end.
        """
        longest = max(map(len, clips_A))
        predicted_ATR = torch.zeros(len(clips_A), longest, len(READINGS), dtype=torch.int32, device=self._device)
        for frame in range(longest):
            showing = [number for number, clip in enumerate(clips_A) if frame < len(clip)]
            frames_ACHW = torch.stack([clips_A[number][frame] for number in showing])
            predicted_ATR[showing, frame] = self._next([stream_A[number] for number in showing], frames_ACHW)
            report()
        return predicted_ATR

    def _next(self, stream_A: list[int], frames_ACHW: Tensor) -> Tensor:
        """Advance these streams by a frame each, and return the classes that each reading predicts, (A, R)."""
        with autocast(self._device, self._amp):
            x_ACHW = self._normalise(frames_ACHW[:, None])[:, 0]
            logit_AK, caches = self._network.stream(x_ACHW, tuple(cache[stream_A] for cache in self._caches))
        for kept, cache in zip(self._caches, caches, strict=True):
            kept[stream_A] = cache.to(kept.dtype)
        latest_AWK = torch.cat([self._latest_SWK[stream_A, 1:], logit_AK[:, None].to(self._latest_SWK.dtype)], 1)
        self._latest_SWK[stream_A] = latest_AWK
        return torch.stack([latest_AWK[:, -frames:].mean(1).argmax(1) for frames in READINGS.values()], 1).int()

"""A trained past-only network on live frames: preprocessed as in evaluation, streamed, averaged over the last frames."""

import time
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.loading.clips import crop_frames, resize_frames
from pipelines.stream.eval_views import evaluation_views
from training.build.numerics import autocast
from training.errors import ConfigError
from tsm.networks import TemporalNetwork
from tsm.streaming import StreamingNetwork, streaming_network

from .exported import OnnxNetwork
from .load import TrainedRun, require_rgb

# Frames over which speed is stated.
_WINDOW = 200


@dataclass(frozen=True)
class LiveScores:
    """The network's answer at a frame."""

    score_K: Tensor
    """Softmax of the mean of the last frames' logits, on the CPU."""
    latency_s: float
    """Time from the image to the scores."""


class LiveNetwork:
    """Maps each frame of one stream to scores. `mean_of`: frames whose logits are averaged.

    Raises ConfigError if the network needs later frames, was exported for whole clips, or is not for RGB frames.
    """

    def __init__(self, run: TrainedRun[TemporalNetwork | OnnxNetwork], mean_of: int) -> None:
        require_rgb(run.name, run.config.model.modality)
        self._network = _streaming_form(run)
        self._run = run
        self._normalise = run.normaliser
        # One view: all frames, the centre crop.
        self._protocol = replace(run.protocol, clips="uniform", crops=1)
        self._caches = self._network.initial_caches(1)
        self._last_logits: deque[Tensor] = deque(maxlen=mean_of)
        # The first call allocates memory and chooses kernels.
        side = self._protocol.side
        self(np.zeros((side, side, 3), dtype=np.uint8))
        self.reset()

    def reset(self) -> None:
        """Forget all frames so far, and start from zeros."""
        self._caches = self._network.initial_caches(1)
        self._last_logits.clear()

    @torch.inference_mode()
    def __call__(self, image_HWC: NDArray[np.uint8]) -> LiveScores:
        started_s = time.perf_counter()
        x_NCHW = self._normalise(self._crop(image_HWC)[None])[0]
        with autocast(self._run.device, self._run.config.evaluation.amp):
            logit_NK, self._caches = self._network.stream(x_NCHW, self._caches)
        self._last_logits.append(logit_NK[0].float().cpu())
        score_K = torch.stack(tuple(self._last_logits)).mean(0).softmax(0)
        return LiveScores(score_K, time.perf_counter() - started_s)

    def _crop(self, image_HWC: NDArray[np.uint8]) -> Tensor:
        """Scale and crop an upright RGB image to uint8 (1, 3, H, W), as the evaluation does."""
        height, width = image_HWC.shape[:2]
        (view,) = evaluation_views(self._protocol, self._protocol.num_frames, width, height)
        assert view.scaled is not None
        image_1CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
        return crop_frames(resize_frames(image_1CHW, *view.scaled), view)


def _streaming_form(run: TrainedRun[TemporalNetwork | OnnxNetwork]) -> StreamingNetwork | OnnxNetwork:
    if isinstance(run.network, OnnxNetwork):
        if run.network.form != "stream":
            raise ConfigError(
                f"{run.name} cannot run on a stream: it was exported for whole clips. Fix: python export.py RUN form=stream"
            )
        return run.network
    try:
        return streaming_network(run.network)
    except ValueError as error:
        raise ConfigError(f"{run.name} cannot run on a stream: {error}") from error


class Speed:
    """Frames per second and latency percentiles of the last frames."""

    def __init__(self) -> None:
        self.frames = 0
        self._ended_s: deque[float] = deque(maxlen=_WINDOW)
        self._latency_s: deque[float] = deque(maxlen=_WINDOW)

    def add(self, latency_s: float) -> None:
        self.frames += 1
        self._ended_s.append(time.perf_counter())
        self._latency_s.append(latency_s)

    @property
    def fps(self) -> float:
        """Frames that the network takes per second of this process's time; 0 before the second frame."""
        passed_s = self._ended_s[-1] - self._ended_s[0] if self._ended_s else 0.0
        return (len(self._ended_s) - 1) / passed_s if passed_s > 0 else 0.0

    def latency_ms(self) -> dict[str, float]:
        """Return the percentiles 50, 95 and 99 of the latency in ms, by name; empty before the first frame."""
        if not self._latency_s:
            return {}
        values = np.percentile(np.array(self._latency_s) * 1000, (50, 95, 99)).round(2).tolist()
        return dict(zip(("p50", "p95", "p99"), values, strict=True))

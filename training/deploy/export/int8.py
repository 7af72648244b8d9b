"""Quantize to int8 with ranges from training clips, and score the result on validation clips."""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.loading.clips import EvaluationClips
from training.build.data import evaluation_clips_of, open_manifest, source_of
from training.build.normalise import Normaliser
from training.deploy.load import TrainedRun
from training.errors import DataError

from .check import Run, logits_over, stream_over
from .forms import Exportable, Files

CALIBRATION_CLIPS = 20
VALIDATION_CLIPS = 500
AGREEMENT_PERCENT = 99.0
"""Least part of the validation clips for which int8 must answer as PyTorch does."""
LOSS_PERCENT = 0.5
"""Most points of top-1 that int8 may lose."""
# Clips or streams at once.
_BATCH = 10


@dataclass(frozen=True)
class ClipSet:
    """Clips of one split of the run's data set, spread over its manifest."""

    clips: EvaluationClips
    row_N: list[int]
    label_K: list[int]
    """The run's label of each class of the manifest."""
    normalise: Normaliser

    def batches(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield videos (N, T, 3, H, W) as an exported network takes them, one view of each clip, and the run's labels (N,).

        Clips that do not decode are left out.
        """
        for start in range(0, len(self.row_N), batch):
            row_N = np.array(self.row_N[start : start + batch])
            found = self.clips[row_N, np.ones(len(row_N), dtype=np.bool_)]
            video_NTCHW = self.normalise(found.video_NTCHW[:: self.clips.protocol.views][found.real_N])
            label_N = torch.tensor(self.label_K)[found.label_N[found.real_N]]
            yield video_NTCHW.to("cpu", torch.float32).contiguous(), label_N


@dataclass(frozen=True)
class Clips:
    """The clips that int8 needs."""

    calibration: ClipSet
    validation: ClipSet


def open_clips(run: TrainedRun) -> Clips:
    """Open clips of both splits of the run's data set. Raises DataError if it is gone or has other classes."""
    return Clips(_clip_set(run, "train", CALIBRATION_CLIPS), _clip_set(run, "val", VALIDATION_CLIPS))


def _clip_set(run: TrainedRun, split: str, most: int) -> ClipSet:
    config = run.config
    try:
        manifest = open_manifest(config.data, split)
    except DataError as error:
        raise DataError(f"precision=int8 needs clips of the run's data set: {error}, or precision=fp32") from error
    if set(manifest.classes) != set(run.classes):
        raise DataError(
            f"{manifest.path} has other classes than the run. Fix: data.root=FOLDER of the data set that it was trained on"
        )
    source = source_of(config.pipeline, manifest, run.device, config.data.retry_s)
    protocol = replace(run.protocol, crops=1, full_resolution=False)
    count = min(most, len(manifest))
    row_N = [index * len(manifest) // count for index in range(count)]
    label_K = [run.classes.index(name) for name in manifest.classes]
    return ClipSet(evaluation_clips_of(source, protocol, config.data), row_N, label_K, run.normaliser)


def quantize_onnx(files: Files, network: Exportable, calls: Iterable[list[Tensor]]) -> Files:
    """Return the ONNX file with 8-bit weights, in a scale per channel, and 8-bit activations (static QDQ, MinMax).

    Ranges are those of these calls.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as temporary:
        prepared, quantized = Path(temporary) / "prepared.onnx", Path(temporary) / "int8.onnx"
        given = Path(temporary) / "fp32.onnx"
        given.write_bytes(files["model.onnx"])
        # ONNX Runtime warns of what its own preparation then does.
        logging.disable(logging.WARNING)
        try:
            quant_pre_process(given, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                quantized,
                _Reader(network, calls),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
        finally:
            logging.disable(logging.NOTSET)
        return {"model.onnx": quantized.read_bytes()}


class _Reader:
    """ONNX Runtime's CalibrationDataReader over calls: a `get_next` that returns None at the end."""

    def __init__(self, network: Exportable, calls: Iterable[list[Tensor]]) -> None:
        self._names, self._calls = list(network.inputs), iter(calls)

    def get_next(self) -> dict[str, Any] | None:
        call = next(self._calls, None)
        return None if call is None else dict(zip(self._names, (tensor.numpy() for tensor in call), strict=True))


def calls_of(network: Exportable, clips: ClipSet) -> Iterator[list[Tensor]]:
    """Yield the inputs of each call that shows the clips one after another, a stream's caches carried from clip to clip."""
    caches = network.zeros(1)[1:]
    for video_NTCHW, _ in clips.batches(1):
        if network.form == "clip":
            yield [video_NTCHW]
            continue
        for frame_NCHW in video_NTCHW.unbind(1):
            yield [frame_NCHW, *caches]
            _, *caches = network.run([frame_NCHW, *caches])


class _Answers:
    """Maps batches of clips to answers; with `carried`, clip n of a batch follows clip n of the batch before."""

    def __init__(self, network: Exportable, run: Run, carried: bool) -> None:
        self._network, self._run, self._carried = network, run, carried
        self._caches: list[Tensor] = []

    def __call__(self, video_NTCHW: Tensor) -> Tensor:
        if not self._carried:
            return logits_over(self._network, self._run, video_NTCHW).mean(1).argmax(1)
        count = len(video_NTCHW)
        if not self._caches or len(self._caches[0]) < count:
            # Other clips come before the first ones.
            _, self._caches = stream_over(self._run, video_NTCHW.roll(1, 0), self._network.zeros(count)[1:])
        logit_NTK, kept = stream_over(self._run, video_NTCHW, [cache[:count] for cache in self._caches])
        # The last batch may be smaller.
        self._caches = [torch.cat((new, old[count:])) for new, old in zip(kept, self._caches, strict=True)]
        return logit_NTK.mean(1).argmax(1)


@dataclass(frozen=True)
class Agreement:
    """How the answers of an int8 file compare with PyTorch's in float32."""

    clips: int
    agreement_percent: float
    top1_percent: float
    fp32_top1_percent: float

    @property
    def good(self) -> bool:
        loss = self.fp32_top1_percent - self.top1_percent
        return self.agreement_percent >= AGREEMENT_PERCENT and loss <= LOSS_PERCENT


@torch.no_grad()
def agreement_of(network: Exportable, run: Run, validation: ClipSet, batch: int | None, carried: bool) -> Agreement:
    """Answer clips with the file and with PyTorch, by the mean of the logits over a clip's frames.

    `batch`: the only batch that the file takes; None: any. `carried`: clips follow each other as on a stream, and none begins
    with caches of zeros.
    """
    right = right_fp32 = same = count = 0
    answers = [_Answers(network, each, carried) for each in (run, network.run)]
    for video_NTCHW, label_N in validation.batches(batch or _BATCH):
        answer_N, expected_N = (each(video_NTCHW) for each in answers)
        right += int((answer_N == label_N).sum())
        right_fp32 += int((expected_N == label_N).sum())
        same += int((answer_N == expected_N).sum())
        count += len(label_N)
    if count == 0:
        raise DataError("precision=int8: no validation clip decodes. Fix: `evaluate.py --run RUN` prints the reasons")
    return Agreement(count, 100 * same / count, 100 * right / count, 100 * right_fp32 / count)

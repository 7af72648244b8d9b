"""Batches of clips from worker processes, in a given order, for torch on any device."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from .decode import decode_clip
from .draw import Augmentation, Draw, evaluation_draw, replacement_row, training_draw
from .manifest import Manifest, ManifestRow
from .order import StreamOrder
from .scan import BadClip

_REPLACEMENT_ATTEMPTS = 10


@dataclass(frozen=True)
class BadClipRecord:
    """A clip that could not be decoded, and why."""

    row: int
    epoch: int
    reason: str
    replaced_by: int | None = None


@dataclass(frozen=True)
class ClipBatch:
    """A batch as every loader yields it.

    `video_NTCHW` uint8, `label_N` int64, `row_N` int64 (manifest rows, after any replacement), `real_N` bool: False for
    padding and for missing clips of an evaluation, which must not be counted. `bad_clips`: what could not be decoded.
    """

    video_NTCHW: Tensor
    label_N: Tensor
    row_N: Tensor
    real_N: Tensor
    bad_clips: tuple[BadClipRecord, ...] = ()

    def pin_memory(self) -> "ClipBatch":
        return replace(
            self,
            video_NTCHW=self.video_NTCHW.pin_memory(),
            label_N=self.label_N.pin_memory(),
            real_N=self.real_N.pin_memory(),
        )


@dataclass(frozen=True)
class ClipSource:
    """Decodes and augments clips of one manifest; travels to worker processes, each of which maps the manifest itself."""

    manifest_path: Path
    augmentation: Augmentation
    seed: int
    decoder: str

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.open(self.manifest_path)

    def pixels(self, row: ManifestRow, draw: Draw) -> Tensor:
        """uint8 (T, 3, size, size); raises BadClip."""
        path = self.manifest.root / row.path
        video_TCHW = decode_clip(self.decoder, self.manifest.root, row, draw.frame_T)
        upright_width, upright_height = upright_size(row)
        if video_TCHW.shape[2:] != (upright_height, upright_width):
            raise BadClip(
                f"{path}: frames are {tuple(video_TCHW.shape[2:])}, the manifest says {(upright_height, upright_width)}"
            )
        crop_TCHW = video_TCHW[:, :, draw.top : draw.top + draw.height, draw.left : draw.left + draw.width]
        if draw.flip:
            crop_TCHW = crop_TCHW.flip(-1)
        size = self.augmentation.size
        if (draw.height, draw.width) == (size, size):
            return crop_TCHW
        return interpolate(crop_TCHW, (size, size), mode="bilinear", antialias=True)


def upright_size(row: ManifestRow) -> tuple[int, int]:
    """(width, height) of a row's frames as they are shown."""
    return (row.height, row.width) if row.rotation % 180 else (row.width, row.height)


@dataclass(frozen=True)
class TrainingClips(Dataset[ClipBatch]):
    """Maps stream positions (N,) to a ClipBatch; a clip that cannot be decoded is replaced by rule, and reported."""

    source: ClipSource
    _order: StreamOrder = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", StreamOrder(len(self.source.manifest), self.source.seed))

    def __getitem__(self, position_N: NDArray[np.int64]) -> ClipBatch:
        bad_clips: list[BadClipRecord] = []
        epoch_N, row_N = self._order.at(position_N)
        clips = [self._clip(int(epoch), int(row), bad_clips) for epoch, row in zip(epoch_N, row_N, strict=True)]
        return _collate(clips, np.ones(len(clips), dtype=np.bool_), bad_clips)

    def _clip(self, epoch: int, row: int, bad_clips: list[BadClipRecord]) -> tuple[Tensor, int, int]:
        """`(video_TCHW, label, row)` of a row, or of the first replacement that decodes."""
        source, candidate = self.source, row
        for attempt in range(_REPLACEMENT_ATTEMPTS):
            entry = source.manifest.row(candidate)
            draw = training_draw(
                source.augmentation, entry.num_frames, *upright_size(entry), source.seed, epoch, candidate
            )
            try:
                return source.pixels(entry, draw), entry.label, candidate
            except BadClip as error:
                substitute = replacement_row(len(source.manifest), source.seed, epoch, row, attempt)
                bad_clips.append(BadClipRecord(candidate, epoch, str(error), substitute))
                candidate = substitute
        raise BadClip(
            f"row {row} and {_REPLACEMENT_ATTEMPTS - 1} replacements cannot be decoded; the last: {bad_clips[-1].reason}"
        )


@dataclass(frozen=True)
class EvaluationClips(Dataset[ClipBatch]):
    """Maps `(row_N, real_N)` to a ClipBatch; a clip that cannot be decoded becomes zeros that are not real."""

    source: ClipSource

    def __getitem__(self, rows: tuple[NDArray[np.int64], NDArray[np.bool_]]) -> ClipBatch:
        row_N, real_N = rows
        real_N = real_N.copy()
        bad_clips: list[BadClipRecord] = []
        augmentation = self.source.augmentation
        blank_TCHW = torch.zeros(augmentation.num_frames, 3, augmentation.size, augmentation.size, dtype=torch.uint8)
        clips = []
        for slot, row in enumerate(row_N.tolist()):
            entry = self.source.manifest.row(row)
            video_TCHW = blank_TCHW
            if real_N[slot]:
                draw = evaluation_draw(augmentation, entry.num_frames, *upright_size(entry))
                try:
                    video_TCHW = self.source.pixels(entry, draw)
                except BadClip as error:
                    bad_clips.append(BadClipRecord(row, 0, str(error)))
                    real_N[slot] = False
            clips.append((video_TCHW, entry.label, row))
        return _collate(clips, real_N, bad_clips)


def _collate(
    clips: list[tuple[Tensor, int, int]], real_N: NDArray[np.bool_], bad_clips: list[BadClipRecord]
) -> ClipBatch:
    videos, labels, rows = zip(*clips, strict=True)
    return ClipBatch(
        video_NTCHW=torch.stack(videos),
        label_N=torch.tensor(labels),
        row_N=torch.tensor(rows),
        real_N=torch.from_numpy(real_N),
        bad_clips=tuple(bad_clips),
    )


def start_worker_server() -> None:
    """Start the process that loader workers are forked from; call it before MPI, Horovod or CUDA live in this process.

    The server imports what workers need once. It ignores Ctrl-C, which reaches the whole terminal's process group: the
    training process decides when workers end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, previous)


class ClipLoader:
    """Yields `dataset[item]` for each item of a plan, in order, decoded ahead by `workers` processes (0: in this one)."""

    def __init__(self, dataset: Dataset[ClipBatch], workers: int, prefetch: int, pin_memory: bool = False) -> None:
        self._dataset = dataset
        self._options: dict[str, Any] = {"batch_size": None, "collate_fn": _as_is, "pin_memory": pin_memory}
        if workers > 0:
            self._options |= {
                "num_workers": workers,
                "prefetch_factor": prefetch,
                "multiprocessing_context": "forkserver",
                "worker_init_fn": _prepare_worker,
            }

    def batches(self, plan: Iterable[Any]) -> Iterator[ClipBatch]:
        """Batches of the plan's items; worker processes live until the iterator is exhausted or dropped."""
        return iter(DataLoader(self._dataset, sampler=plan, **self._options))  # type: ignore[arg-type]


def _as_is(batch: ClipBatch) -> ClipBatch:
    return batch


def _prepare_worker(worker: int) -> None:
    """Ctrl-C is the training process' business, and a worker must not outlive it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the training process' end: the kernel's own death signal would follow the fork server, which workers keep up."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

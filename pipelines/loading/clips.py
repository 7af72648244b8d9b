"""Datasets of training and evaluation clips: one index is a batch of decoded, cropped clips."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from pipelines.decoding.decode import decode_clip
from pipelines.decoding.storage_faults import read_patiently
from pipelines.errors import BadClip
from pipelines.manifest import Manifest, ManifestRow
from pipelines.stream.augmentation import (
    Augmentation,
    SampleParams,
    burn_in_row,
    replacement_row,
    sample_burn_in_params,
    sample_training_params,
)
from pipelines.stream.eval_views import EvalProtocol, evaluation_views
from pipelines.stream.mirror_labels import Mirror, find_mirror, mirrored_labels
from pipelines.stream.modality import CHANNELS_PER_FRAME, FLOW, FRAMES_PER_SEGMENT
from pipelines.stream.order import StreamOrder

_REPLACEMENT_ATTEMPTS = 10


@dataclass(frozen=True)
class BadClipRecord:
    """A clip that could not be decoded, and the reason."""

    row: int
    epoch: int
    reason: str
    replaced_by: int | None = None


@dataclass(frozen=True)
class ClipBatch:
    """A batch, as every loader yields it.

    `video_NTCHW` uint8, `label_N` int64, `row_N` int64 (manifest rows, after any replacement), `real_N` bool: False for
    padding and missing clips of an evaluation, which must not be counted. `bad_clips`: the clips that did not decode.
    With several views per clip (evaluation) the video is (N * views, T, C, H, W), a clip's views next to each other.
    `burn_in_label_N` int64: the labels of the clips before each clip, if the loss scores their frames.
    """

    video_NTCHW: Tensor
    label_N: Tensor
    row_N: Tensor
    real_N: Tensor
    bad_clips: tuple[BadClipRecord, ...] = ()
    burn_in_label_N: Tensor | None = None

    def pin_memory(self) -> "ClipBatch":
        return replace(
            self,
            burn_in_label_N=None if self.burn_in_label_N is None else self.burn_in_label_N.pin_memory(),
            video_NTCHW=self.video_NTCHW.pin_memory(),
            label_N=self.label_N.pin_memory(),
            real_N=self.real_N.pin_memory(),
        )


class LoadedClip(NamedTuple):
    """A clip that is not collated yet: pixels or a source's EncodedClip, label and row; with a burn-in also its label."""

    content: Any
    label: int
    row: int
    burn_in_label: int | None = None


Clips = tuple[list[LoadedClip], NDArray[np.bool_], list[BadClipRecord]]
"""The clips of a batch; which are real; bad clips."""


@dataclass(frozen=True)
class ClipSource:
    """Decodes clips of one manifest. Pickles small: each worker process maps the manifest itself."""

    manifest_path: Path
    decoder: str
    retry_s: float = 0.0
    """Time to wait for a file system that fails, before StorageFault is raised."""

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.open(self.manifest_path)

    def pixels(self, row: ManifestRow, params: SampleParams, size: int) -> Tensor:
        """Decode, crop and resize a training clip to uint8 (T, C, size, size). Raises BadClip."""
        crop_FCHW = crop_frames(self._frames(row, params.frame_T), params)
        return stack_segments(resize_frames(crop_FCHW, size, size), params.flip)

    def view_pixels(self, row: ManifestRow, views: list[SampleParams]) -> Tensor:
        """Decode all views of a clip to uint8 (V, T, C, H, W), each frame once; all have the same scale. Raises BadClip."""
        assert views[0].scaled is not None
        width, height = views[0].scaled
        needed_F = frames_needed(views)
        return cut_views(resize_frames(self._frames(row, needed_F), width, height), needed_F, views)

    def _frames(self, row: ManifestRow, frame_T: NDArray[np.int64]) -> Tensor:
        """Decode whole upright frames, uint8 (F, 3, H, W), or flow fields, uint8 (F, 2, H, W)."""
        video_TCHW = decode_clip(self.decoder, self.manifest.root, row, frame_T)
        upright_width, upright_height = row.upright_size
        if video_TCHW.shape[2:] != (upright_height, upright_width):
            raise BadClip(
                f"{self.manifest.root / row.path}: frames are {tuple(video_TCHW.shape[2:])}, "
                f"the manifest says {(upright_height, upright_width)}"
            )
        return video_TCHW


def frames_needed(views: list[SampleParams]) -> NDArray[np.int64]:
    """List the frames that a clip's views need, ascending, without repeats."""
    return np.unique(np.concatenate([view.frame_T for view in views]))


def cut_views(frames_FCHW: Tensor, needed_F: NDArray[Any], views: list[SampleParams]) -> Tensor:
    """Cut all views, (V, T, C, H, W), from the frames `needed_F` of a clip, upright and scaled."""
    return torch.stack([_cut_view(frames_FCHW, needed_F, view) for view in views])


def _cut_view(frames_FCHW: Tensor, needed_F: NDArray[Any], view: SampleParams) -> Tensor:
    frames_FCHW = crop_frames(frames_FCHW, view)[np.searchsorted(needed_F, view.frame_T)]
    return stack_segments(frames_FCHW, view.flip)


def crop_frames(video_TCHW: Tensor, params: SampleParams) -> Tensor:
    """Cut out a view's rectangle and mirror it if the view says so; takes all frames. Flow also needs `stack_segments`."""
    crop_TCHW = video_TCHW[:, :, params.top : params.top + params.height, params.left : params.left + params.width]
    return crop_TCHW.flip(-1) if params.flip else crop_TCHW


def resize_frames(video_TCHW: Tensor, width: int, height: int) -> Tensor:
    """Resize with an antialiased bilinear filter: Pillow's, which the official code uses."""
    if video_TCHW.shape[2:] == (height, width):
        return video_TCHW
    return interpolate(video_TCHW, (height, width), mode="bilinear", antialias=True)


def stack_segments(video_FCHW: Tensor, mirrored: bool = False) -> Tensor:
    """Stack the flow fields (..., F, 2, H, W) of each segment: (..., T, C, H, W) with the channels x1 y1 x2 y2 and so on.

    RGB frames stay as they are. `mirrored`: the columns are, so invert x. As in the official code, cropping and resizing do not
    change the values, though a motion of some pixels of the stored flow is another number of pixels of the network's input.
    """
    if video_FCHW.shape[-3] != CHANNELS_PER_FRAME[FLOW]:
        return video_FCHW
    flow_TCHW = video_FCHW.unflatten(-4, (-1, FRAMES_PER_SEGMENT[FLOW])).flatten(-4, -3)
    if mirrored:
        invert_x(flow_TCHW)
    return flow_TCHW


def invert_x(flow_TCHW: Tensor) -> None:
    """Replace x by 255 - x in place: in a mirrored clip, motion to the left is motion to the right."""
    flow_TCHW[..., ::2, :, :].bitwise_not_()


@dataclass(frozen=True)
class TrainingClips(Dataset[ClipBatch]):
    """Maps stream positions (N,) to a ClipBatch; replaces and reports clips that cannot be decoded.

    With `augmentation.stream`, frames of another clip precede each clip in its video, and label and row are the clip's own.
    Raises ValueError if flip=relabel and a class has no mirrored class (pipelines/stream/mirror_labels.py).
    """

    source: ClipSource
    augmentation: Augmentation
    seed: int
    _order: StreamOrder = field(init=False)
    _mirrored_labels: list[int] = field(init=False)

    def __post_init__(self) -> None:
        manifest = self.source.manifest
        labels = list(range(len(manifest.classes)))
        if self.augmentation.flip == "relabel":
            labels = mirrored_labels(manifest.classes, self.augmentation.mirrored_words)
        object.__setattr__(self, "_order", StreamOrder(len(manifest), self.seed))
        object.__setattr__(self, "_mirrored_labels", labels)

    def __getitem__(self, position_N: NDArray[np.int64]) -> ClipBatch:
        return _collate(*self.clips(position_N))

    def clips(self, position_N: NDArray[np.int64]) -> Clips:
        """Read the clips at these positions of the stream; all are real."""
        bad_clips: list[BadClipRecord] = []
        epoch_N, row_N = self._order.at(position_N)
        clips = [self._clip(int(epoch), int(row), bad_clips) for epoch, row in zip(epoch_N, row_N, strict=True)]
        return clips, np.ones(len(clips), dtype=np.bool_), bad_clips

    def _clip(self, epoch: int, row: int, bad_clips: list[BadClipRecord]) -> LoadedClip:
        """Read a row, or its first replacement that decodes, after its burn-in."""
        augmentation, seed = self.augmentation, self.seed
        clip = self._read(
            epoch,
            row,
            lambda row, entry: sample_training_params(
                augmentation, entry.num_frames, *entry.upright_size, seed, epoch, row
            ),
            bad_clips,
        )
        if not augmentation.burn_in:
            return clip
        before = self._read(
            epoch,
            burn_in_row(len(self.source.manifest), seed, epoch, clip.row),
            lambda row, entry: sample_burn_in_params(
                augmentation, entry.num_frames, *entry.upright_size, seed, epoch, clip.row, row
            ),
            bad_clips,
        )
        return clip._replace(content=torch.cat([before.content, clip.content]), burn_in_label=before.label)

    def _read(
        self, epoch: int, row: int, sample: Callable[[int, ManifestRow], SampleParams], bad_clips: list[BadClipRecord]
    ) -> LoadedClip:
        """Read a row, or its first replacement that decodes, with the parameters that `sample` returns."""
        source, candidate = self.source, row
        for attempt in range(_REPLACEMENT_ATTEMPTS):
            entry = source.manifest.row(candidate)
            params = sample(candidate, entry)
            try:
                video_TCHW = read_patiently(
                    partial(source.pixels, entry, params, self.augmentation.size),
                    source.manifest.root,
                    entry,
                    source.retry_s,
                )
            except BadClip as error:
                substitute = replacement_row(len(source.manifest), self.seed, epoch, row, attempt)
                bad_clips.append(BadClipRecord(candidate, epoch, str(error), substitute))
                candidate = substitute
                continue
            label = self._mirrored_labels[entry.label] if params.flip else entry.label
            return LoadedClip(video_TCHW, label, candidate)
        raise BadClip(
            f"row {row} and {_REPLACEMENT_ATTEMPTS - 1} replacements cannot be decoded; the last error: {bad_clips[-1].reason}"
        )


@dataclass(frozen=True)
class EvaluationClips(Dataset[ClipBatch]):
    """Maps `(row_N, real_N)` to a ClipBatch with all views of each clip.

    A clip that cannot be decoded becomes zeros with `real_N` False; it is never replaced.
    """

    source: ClipSource
    protocol: EvalProtocol
    mirrored_words: tuple[tuple[str, str], ...] = ()
    """Words that mirroring exchanges in class names, beside those of mirror_labels.py; for protocols with mirrored views."""

    @property
    def mirror(self) -> Mirror | None:
        """What mirroring does to the classes; None if the protocol mirrors no view."""
        if not self.protocol.mirrors:
            return None
        return find_mirror(self.source.manifest.classes, self.mirrored_words)

    def __getitem__(self, rows: tuple[NDArray[np.int64], NDArray[np.bool_]]) -> ClipBatch:
        batch = _collate(*self.clips(rows))
        return replace(batch, video_NTCHW=batch.video_NTCHW.flatten(0, 1))

    def clips(self, rows: tuple[NDArray[np.int64], NDArray[np.bool_]]) -> Clips:
        """Read the clips of these rows; clips that do not decode are not real."""
        row_N, real_N = rows
        real_N = real_N.copy()
        bad_clips: list[BadClipRecord] = []
        protocol = self.protocol
        blank_VTCHW = torch.zeros(
            protocol.views, protocol.num_frames, protocol.channels, protocol.side, protocol.side, dtype=torch.uint8
        )
        clips = []
        for slot, row in enumerate(row_N.tolist()):
            entry = self.source.manifest.row(row)
            video_VTCHW = blank_VTCHW
            if real_N[slot]:
                views = evaluation_views(protocol, entry.num_frames, *entry.upright_size)
                try:
                    video_VTCHW = read_patiently(
                        partial(self.source.view_pixels, entry, views),
                        self.source.manifest.root,
                        entry,
                        self.source.retry_s,
                    )
                except BadClip as error:
                    bad_clips.append(BadClipRecord(row, 0, str(error)))
                    real_N[slot] = False
            clips.append(LoadedClip(video_VTCHW, entry.label, row))
        return clips, real_N, bad_clips


def _collate(clips: list[LoadedClip], real_N: NDArray[np.bool_], bad_clips: list[BadClipRecord]) -> ClipBatch:
    burn_in_labels = [clip.burn_in_label for clip in clips if clip.burn_in_label is not None]
    return ClipBatch(
        video_NTCHW=torch.stack([clip.content for clip in clips]),
        label_N=torch.tensor([clip.label for clip in clips]),
        row_N=torch.tensor([clip.row for clip in clips]),
        real_N=torch.from_numpy(real_N),
        bad_clips=tuple(bad_clips),
        burn_in_label_N=torch.tensor(burn_in_labels) if burn_in_labels else None,
    )

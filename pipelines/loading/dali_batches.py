"""Batches of clips for a decoder that takes whole batches (DALI): encoded bytes and draws, made ready by worker processes.

Shapes: N clips, F frames of a clip, B bytes, P parts (a video is one, a clip of JPEG frames one for each frame).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.decoding.clip_bytes import clip_bytes, frame_bytes
from pipelines.decoding.decode import decode_clip
from pipelines.decoding.jpeg import check_image_size, jpeg_size
from pipelines.manifest import ManifestRow
from pipelines.stream.augmentation import SampleParams

from .clips import BadClipRecord, ClipBatch, ClipSource, EvaluationClips, TrainingClips, frames_needed

VIDEOS, IMAGES, FRAMES = "videos", "images", "frames"
"""What the batch decoder is fed with: encoded videos, encoded JPEG frames, or frames that were decoded on the host."""


@dataclass(frozen=True)
class EncodedClip:
    """One clip and what is to be done with it, in the orientation in which its frames are stored."""

    parts: list[NDArray[np.uint8]]
    """Encoded bytes (1-d), or decoded frames (F, H, W, 3); empty once they lie in the batch's `content_B`."""
    frame_F: NDArray[np.int32]
    stored: tuple[int, int]
    """(height, width) that the frames must have."""
    window: tuple[int, int, int, int]
    """(top, left, height, width) that is cut out first."""
    size: tuple[int, int]
    """(height, width) that the window is scaled to."""
    quarter_turns: int
    """Counter-clockwise, that turn the scaled frames upright."""
    flip: bool
    """Mirror left and right, once upright."""
    views: list[SampleParams] = field(default_factory=list)
    """Of an evaluation: what is then cut from the upright frames. Its frames are in ascending order, each there once."""


@dataclass(frozen=True)
class EncodedBatch:
    """What becomes a ClipBatch. `clips`: to be decoded, or pixels already, where the batch decoder does not know the codec."""

    item: Any
    """Of the loader's plan: the batch can be made of it in the other way as well."""
    clips: list[EncodedClip | Tensor]
    content_B: Tensor
    """The bytes of all parts of all clips, end to end: one tensor, as each takes a file descriptor on its way here."""
    shapes: list[list[tuple[int, ...]]]
    """Of the parts of each clip that is to be decoded."""
    label_N: Tensor
    row_N: Tensor
    real_N: Tensor
    bad_clips: tuple[BadClipRecord, ...]

    def with_pixels(self, video_NTCHW: Tensor) -> ClipBatch:
        return ClipBatch(video_NTCHW, self.label_N, self.row_N, self.real_N, self.bad_clips)

    def decodable(self) -> list[EncodedClip]:
        return [clip for clip in self.clips if isinstance(clip, EncodedClip)]

    def parts(self) -> list[list[NDArray[np.uint8]]]:
        """The parts of each clip that is to be decoded, as views into `content_B`."""
        content_B, at, clips = self.content_B.numpy(), 0, []
        for shapes in self.shapes:
            clip = []
            for shape in shapes:
                size = int(np.prod(shape))
                clip.append(content_B[at : at + size].reshape(shape))
                at += size
            clips.append(clip)
        return clips


@dataclass(frozen=True)
class EncodedSource(ClipSource):
    """Gives clips undecoded where the batch decoder knows their codec; `feed`: VIDEOS, IMAGES or FRAMES."""

    feed: str = VIDEOS
    codecs: frozenset[str] = frozenset()

    def pixels(self, row: ManifestRow, params: SampleParams, size: int) -> Tensor | EncodedClip:  # type: ignore[override]
        if not self._is_known(row):
            return super().pixels(row, params, size)
        turns, stored = self._orientation(row)
        window = stored_window(params, turns, *stored)
        parts = self._parts(row, params.frame_T)
        return EncodedClip(parts, params.frame_T.astype(np.int32), stored, window, (size, size), turns, params.flip)

    def view_pixels(self, row: ManifestRow, views: list[SampleParams]) -> Tensor | EncodedClip:  # type: ignore[override]
        if not self._is_known(row):
            return super().view_pixels(row, views)
        turns, stored = self._orientation(row)
        assert views[0].scaled is not None
        width, height = views[0].scaled
        size = (width, height) if turns % 2 else (height, width)
        frame_F = frames_needed(views)
        parts = self._parts(row, frame_F)
        return EncodedClip(parts, frame_F.astype(np.int32), stored, (0, 0, *stored), size, turns, False, views)

    def first_frame(self, row: ManifestRow) -> EncodedClip:
        """The whole of a clip's first frame, as it is stored."""
        frame_F, stored = np.zeros(1, np.int64), (row.height, row.width)
        return EncodedClip(
            self._parts(row, frame_F), frame_F.astype(np.int32), stored, (0, 0, *stored), stored, 0, False
        )

    def _is_known(self, row: ManifestRow) -> bool:
        """A frame that is turned by another angle has no upright one: the host's decoders say so."""
        return row.codec in self.codecs and row.rotation % 90 == 0

    def _orientation(self, row: ManifestRow) -> tuple[int, tuple[int, int]]:
        """(quarter turns that are left to do, (height, width) as fed): frames from the host are upright already."""
        if self.feed == FRAMES:
            width, height = row.upright_size
            return 0, (height, width)
        return row.rotation // 90 % 4, (row.height, row.width)

    def _parts(self, row: ManifestRow, frame_F: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        root = self.manifest.root
        if self.feed == VIDEOS:
            return [clip_bytes(root, row)]
        if self.feed == IMAGES:
            return [_picture_bytes(root, row, index) for index in frame_F.tolist()]
        return [decode_clip(self.decoder, root, row, frame_F).permute(0, 2, 3, 1).contiguous().numpy()]


def _picture_bytes(root: Path, row: ManifestRow, index: int) -> NDArray[np.uint8]:
    """Of a JPEG frame of the size that the manifest says."""
    name, content = frame_bytes(root, row, index)
    check_image_size(name, *jpeg_size(name, content), row)
    return np.frombuffer(content, np.uint8)


def stored_window(params: SampleParams, turns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) in frames stored as (height, width) of a crop of the upright ones, which are those after so
    many counter-clockwise quarter turns."""
    top, left, high, wide = params.top, params.left, params.height, params.width
    if turns == 1:  # a row of the upright frame is a column of the stored one, from its right edge on
        return left, width - top - high, wide, high
    if turns == 2:
        return height - top - high, width - left - wide, high, wide
    if turns == 3:
        return height - left - wide, top, wide, high
    return top, left, high, wide


@dataclass(frozen=True)
class EncodedClips(Dataset[EncodedBatch]):
    """Maps an item of a loader's plan to an EncodedBatch; `clips` says which clips are in it, and replaces by its own rule."""

    clips: TrainingClips | EvaluationClips

    def __getitem__(self, item: Any) -> EncodedBatch:
        clips, real_N, bad_clips = self.clips.clips(item)
        decodable = [clip for clip, _, _ in clips if isinstance(clip, EncodedClip)]
        parts = [part.reshape(-1) for clip in decodable for part in clip.parts]
        return EncodedBatch(
            item=item,
            clips=[replace(clip, parts=[]) if isinstance(clip, EncodedClip) else clip for clip, _, _ in clips],
            content_B=torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.uint8),
            shapes=[[part.shape for part in clip.parts] for clip in decodable],
            label_N=torch.tensor([label for _, label, _ in clips]),
            row_N=torch.tensor([row for _, _, row in clips]),
            real_N=torch.from_numpy(real_N),
            bad_clips=tuple(bad_clips),
        )

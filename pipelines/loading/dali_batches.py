"""Batches of encoded clips for DALI: worker processes read the bytes, sample the parameters and find bad clips.

Shapes: N clips, F frames of a clip, B bytes, P parts (a video is one part, each JPEG image is one).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.decoding.clip_bytes import clip_bytes, image_bytes
from pipelines.decoding.decode import decode_clip
from pipelines.decoding.jpeg import check_image_size, jpeg_size
from pipelines.errors import BadClip
from pipelines.jpeg_clips import IMAGES_PER_FRAME, JPEG_FLOW
from pipelines.manifest import ManifestRow
from pipelines.stream.augmentation import SampleParams

from .clips import BadClipRecord, ClipBatch, ClipSource, EvaluationClips, TrainingClips, frames_needed

_END_OF_IMAGE = b"\xff\xd9"
VIDEOS, IMAGES, GREY_IMAGES, FRAMES = "videos", "images", "grey images", "frames"
"""Kinds of input to DALI: encoded videos, encoded JPEG images (grey: x and y of optical flow), or frames decoded on the host."""

PER_IMAGE = (IMAGES, GREY_IMAGES)
"""Kinds of which each image is a sample."""


def kind_of(codec: str) -> str:
    """Return the kind of input by which DALI decodes a codec."""
    if codec not in IMAGES_PER_FRAME:
        return VIDEOS
    return GREY_IMAGES if codec == JPEG_FLOW else IMAGES


# FFmpeg's names of BT.601's matrix, and of a stream that names none, for which FFmpeg takes it.
_BT601 = ("bt470bg", "smpte170m", "unknown")


class Kind(NamedTuple):
    """The fields of a manifest row that decide whether DALI may decode the clip."""

    codec: str
    colour_space: str
    colour_range: str
    mirrored: bool
    fast_seek: bool | None


def why_on_host(clip: ManifestRow | Kind) -> str | None:
    """Return the reason why DALI must not decode a clip whose codec it knows; None if it may.

    DALI converts every video with BT.601's matrix, whatever its stream says (seen on the CPU with 2.1.0; the same in its GPU
    kernel). It recognizes the full range of values by other signs than FFmpeg does, except in MJPEG, which has no other.
    """
    if clip.mirrored:
        return "mirrored for display"
    if clip.codec in IMAGES_PER_FRAME:
        return None
    if not clip.colour_space:
        return "their manifest has no colour space, and DALI assumes BT.601; run prepare.py again"
    if clip.colour_space not in _BT601:
        return f"colours in {clip.colour_space}, and DALI assumes BT.601"
    if (clip.colour_range == "pc") != (clip.codec == "mjpeg"):
        return f"values of the {'full' if clip.colour_range == 'pc' else 'limited'} range, which DALI may take for the other"
    return None if clip.fast_seek else "frames that the scan has not found right in a decoder that seeks"


@dataclass(frozen=True)
class EncodedClip:
    """One clip and the operations to apply to it, in the orientation in which its frames are stored."""

    parts: list[NDArray[np.uint8]]
    """Encoded bytes (1-d), or decoded frames (F, H, W, C); empty after they are moved to the batch's `content_B`."""
    frame_F: NDArray[np.int32]
    stored: tuple[int, int]
    """(height, width) that the stored frames must have."""
    window: tuple[int, int, int, int]
    """(top, left, height, width) of the first crop."""
    size: tuple[int, int]
    """(height, width) to scale the window to."""
    quarter_turns: int
    """Counter-clockwise quarter turns that make the scaled frames upright."""
    flip: bool
    """Mirror left and right, after the turns."""
    views: list[SampleParams] = field(default_factory=list)
    """In an evaluation: the views to cut from the upright frames. `frame_F` is then ascending, without repeats."""


@dataclass(frozen=True)
class EncodedBatch:
    """A ClipBatch before decoding. `clips`: an EncodedClip each, or pixels if DALI does not decode the clip's codec."""

    batch_index: Any
    """The loader's batch index, from which the host can load the same batch without DALI."""
    clips: list[EncodedClip | Tensor]
    content_B: Tensor
    """The bytes of all parts of all clips, concatenated: one tensor, because each tensor sent by a worker takes a file
    descriptor."""
    shapes: list[list[tuple[int, ...]]]
    """The shapes of the parts of each EncodedClip."""
    label_N: Tensor
    row_N: Tensor
    real_N: Tensor
    bad_clips: tuple[BadClipRecord, ...]

    def with_pixels(self, video_NTCHW: Tensor) -> ClipBatch:
        """Make the ClipBatch, given its pixels."""
        return ClipBatch(video_NTCHW, self.label_N, self.row_N, self.real_N, self.bad_clips)

    def decodable(self) -> list[EncodedClip]:
        """List the clips for DALI to decode."""
        return [clip for clip in self.clips if isinstance(clip, EncodedClip)]

    def parts(self) -> list[list[NDArray[np.uint8]]]:
        """List the parts of each clip for DALI to decode, as views into `content_B`."""
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
    """Returns clips undecoded if DALI decodes their codec (one of `codecs`); `feed`: the kind of input to DALI."""

    feed: str = VIDEOS
    codecs: frozenset[str] = frozenset()

    def pixels(self, row: ManifestRow, params: SampleParams, size: int) -> Tensor | EncodedClip:  # type: ignore[override]
        if not self._is_known(row):
            return super().pixels(row, params, size)
        parts = self._parts(row, params.frame_T)
        if parts is None:
            return super().pixels(row, params, size)
        turns, stored = self._orientation(row)
        window = stored_window(params, turns, *stored)
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
        if parts is None:
            return super().view_pixels(row, views)
        return EncodedClip(parts, frame_F.astype(np.int32), stored, (0, 0, *stored), size, turns, False, views)

    def one_frame(self, row: ManifestRow, index: int) -> EncodedClip:
        """Read one frame of a clip, uncropped and as stored. Raises BadClip if DALI must not get it."""
        frame_F, stored = np.array([index], np.int64), (row.height, row.width)
        parts = self._parts(row, frame_F)
        if parts is None:
            raise BadClip(f"{row.path}: a JPEG image lacks its end")
        return EncodedClip(parts, frame_F.astype(np.int32), stored, (0, 0, *stored), stored, 0, False)

    def _is_known(self, row: ManifestRow) -> bool:
        """Tell whether DALI gets the clip. The host mirrors frames, and raises BadClip if they are not turned by quarters."""
        decodes = self.feed == FRAMES or why_on_host(row) is None
        return row.codec in self.codecs and decodes and row.rotation % 90 == 0 and not row.mirrored

    def _orientation(self, row: ManifestRow) -> tuple[int, tuple[int, int]]:
        """Compute (remaining quarter turns, (height, width) of DALI's input). The host decodes to upright frames."""
        if self.feed == FRAMES:
            width, height = row.upright_size
            return 0, (height, width)
        return row.rotation // 90 % 4, (row.height, row.width)

    def _parts(self, row: ManifestRow, frame_F: NDArray[np.int64]) -> list[NDArray[np.uint8]] | None:
        """Read what DALI gets; None if the host has to decode the clip: DALI 2.4.0 crashes on a JPEG image that is cut off."""
        root = self.manifest.root
        if self.feed == VIDEOS:
            return [clip_bytes(root, row)]
        if self.feed in PER_IMAGE:
            images = [_image_bytes(root, row, image) for index in frame_F.tolist() for image in row.images_of(index)]
            return images if all(bytes(image[-2:]) == _END_OF_IMAGE for image in images) else None
        return [decode_clip(self.decoder, root, row, frame_F).permute(0, 2, 3, 1).contiguous().numpy()]


def _image_bytes(root: Path, row: ManifestRow, image: int) -> NDArray[np.uint8]:
    """Read a JPEG image. Raises BadClip if its size differs from the manifest row."""
    name, content = image_bytes(root, row, image)
    check_image_size(name, *jpeg_size(name, content), row)
    return np.frombuffer(content, np.uint8)


def stored_window(params: SampleParams, turns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Convert a crop of the upright frames to (top, left, height, width) in the stored frames.

    `turns`: counter-clockwise quarter turns from stored to upright; `height`, `width`: of the stored frames.
    """
    top, left, high, wide = params.top, params.left, params.height, params.width
    if turns == 1:
        # The upright frame's row 0 is the stored frame's last column.
        return left, width - top - high, wide, high
    if turns == 2:
        return height - top - high, width - left - wide, high, wide
    if turns == 3:
        return height - left - wide, top, wide, high
    return top, left, high, wide


@dataclass(frozen=True)
class EncodedClips(Dataset[EncodedBatch]):
    """Maps a batch index to an EncodedBatch; `clips` chooses the clips of the batch and replaces bad ones by its rule."""

    clips: TrainingClips | EvaluationClips

    def __getitem__(self, batch_index: Any) -> EncodedBatch:
        clips, real_N, bad_clips = self.clips.clips(batch_index)
        decodable = [clip for clip, *_ in clips if isinstance(clip, EncodedClip)]
        parts = [part.reshape(-1) for clip in decodable for part in clip.parts]
        return EncodedBatch(
            batch_index=batch_index,
            clips=[replace(clip, parts=[]) if isinstance(clip, EncodedClip) else clip for clip, *_ in clips],
            content_B=torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.uint8),
            shapes=[[part.shape for part in clip.parts] for clip in decodable],
            label_N=torch.tensor([clip.label for clip in clips]),
            row_N=torch.tensor([clip.row for clip in clips]),
            real_N=torch.from_numpy(real_N),
            bad_clips=tuple(bad_clips),
        )

"""Read the encoded bytes of a clip: from a file of its own, a folder of JPEG files, or a shard.

`root` is the manifest's folder. Each function raises BadClip if the clip is missing or differs from its manifest row.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import BadClip
from pipelines.jpeg_clips import IMAGES_PER_FRAME
from pipelines.manifest import ManifestRow, image_file, in_shard

from .shard_reader import open_shard
from .staged_copies import NoCandidateError, candidates
from .video import EncodedVideo, video_stream


def clip_bytes(root: Path, row: ManifestRow) -> NDArray[np.uint8]:
    """Read all bytes of a video clip, for a decoder that takes only bytes.

    Opens the video first. DALI would end its pipeline on a broken header, or take all memory for images beyond MAX_PIXELS.
    """
    for candidate in candidates(root, row):
        with candidate as path:
            return _opened_bytes(video_at(path, row), row)
    raise NoCandidateError


def _opened_bytes(video: EncodedVideo, row: ManifestRow) -> NDArray[np.uint8]:
    try:
        with video_stream(video):
            return read_video(video, row)
    except BadClip:
        raise
    # Broken files raise many kinds of exception.
    except Exception as error:
        raise BadClip(f"{video.name}: cannot be opened: {error}") from error


def image_bytes(root: Path, row: ManifestRow, image: int) -> tuple[str, bytes]:
    """Read (name for messages, encoded bytes) of one image of a clip of JPEG images, counted as in `ManifestRow.num_images`."""
    for candidate in candidates(root, row):
        with candidate as path:
            return image_at(path, row, image)
    raise NoCandidateError


def encoded_video(root: Path, row: ManifestRow) -> EncodedVideo:
    """Find a video clip, for a decoder to open."""
    for candidate in candidates(root, row):
        with candidate as path:
            return video_at(path, row)
    raise NoCandidateError


def video_at(path: Path, row: ManifestRow) -> EncodedVideo:
    """Find a video clip; `path`: its file or its shard."""
    if in_shard(row):
        member, content = open_shard(path).member(row.offset, row.length)
        return EncodedVideo(f"{path}, {member}", content)
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise BadClip(f"{path}: {error.strerror}") from error
    _check_size(path, size, row)
    return EncodedVideo(str(path), path)


def read_video(video: EncodedVideo, row: ManifestRow) -> NDArray[np.uint8]:
    """Read the bytes of a video found by `video_at`."""
    if isinstance(video.source, np.ndarray):
        return video.source
    try:
        content = np.fromfile(video.source, dtype=np.uint8)
    except OSError as error:
        raise BadClip(f"{video.name}: {error.strerror or error}") from error
    _check_size(video.source, len(content), row)
    return content


def image_at(path: Path, row: ManifestRow, image: int) -> tuple[str, bytes]:
    """Read (name, bytes) of one JPEG image; `path`: the pattern of the images' files, or the shard."""
    if not 0 <= image < row.num_images:
        frame = image // IMAGES_PER_FRAME[row.codec]
        raise BadClip(f"{path}: frame {frame} of a clip of {row.num_frames}")
    if in_shard(row):
        shard = open_shard(path)
        start, length = shard.images(row.offset, row.num_images)[image].tolist()
        member, content = shard.member(row.offset + start, length)
        return f"{path}, {member}", content.tobytes()
    path = image_file(path, row, image)
    try:
        return str(path), path.read_bytes()
    except OSError as error:
        raise BadClip(f"{path}: {error.strerror}") from error


def check_clip(root: Path, row: ManifestRow) -> None:
    """Check that the clip is where its row says and has the right length, without reading its bytes."""
    path = root / row.path
    if in_shard(row):
        _check_in_shard(path, row)
    elif not row.is_images:
        video_at(path, row)
    else:
        try:
            size = sum(os.stat(image_file(path, row, image)).st_size for image in range(row.num_images))
        except OSError as error:
            raise BadClip(f"{error.filename}: {error.strerror}") from error
        _check_size(path, size, row)


def _check_in_shard(path: Path, row: ManifestRow) -> None:
    shard = open_shard(path)
    if not row.is_images:
        shard.member_name(row.offset, row.length)
        return
    index = shard.images(row.offset, row.num_images)
    for start, length in index.tolist():
        shard.member_name(row.offset + start, length)
    end = int(index[-1]["start"] + index[-1]["length"])
    if end != row.length:
        raise BadClip(f"{path}: frames of {end} bytes, but {row.length} when the manifest was made: replaced since")


def _check_size(path: Path, size: int, row: ManifestRow) -> None:
    if size != row.length:
        raise BadClip(f"{path}: {size} bytes, but {row.length} when the manifest was made: truncated or replaced since")

"""Decode JPEG images, read their size from the header, and check it against the manifest before decoding."""

import struct
import warnings

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines.errors import BadClip
from pipelines.manifest import ManifestRow

from .video import check_pixels


def check_image_size(name: str, width: int, height: int, row: ManifestRow) -> None:
    """Raise BadClip if an image differs in size from its row; call it before allocating the pixels."""
    if (width, height) != (row.width, row.height):
        raise BadClip(f"{name}: {width}x{height}, but {row.width}x{row.height} when the manifest was made")


def jpeg_size(name: str, content: bytes) -> tuple[int, int]:
    """Read (width, height) from a JPEG header (ITU-T T.81, B.2.2) without decoding. Raises BadClip if there is none."""
    if not content:
        raise BadClip(f"{name}: the file is empty")
    if content[:2] != b"\xff\xd8":
        raise BadClip(f"{name}: not a JPEG file")
    at = content.find(b"\xff", 2)
    while 0 <= at <= len(content) - 9:
        marker = content[at + 1]
        if marker in _START_OF_FRAME:
            height, width = struct.unpack_from(">HH", content, at + 5)
            return width, height
        has_length = marker not in _WITHOUT_LENGTH
        at = content.find(b"\xff", at + 2 + struct.unpack_from(">H", content, at + 2)[0] if has_length else at + 1)
    raise BadClip(f"{name}: no image size in its header: truncated or damaged")


def decode_jpeg_bytes(name: str, content: bytes, grey: bool = False) -> Tensor:
    """Decode to uint8 (3, H, W), RGB, or (1, H, W), from any colour space (grey, CMYK), as stored: an EXIF orientation is ignored.

    Raises BadClip if the image is truncated, too large or not a JPEG. Damage that keeps the file's structure is not detected,
    as in every decoder built on libjpeg.
    """
    check_pixels(name, *jpeg_size(name, content))
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    with warnings.catch_warnings():
        # torchvision 0.29 warns on each call that torchcodec will replace it. torchcodec needs FFmpeg, torchvision does not.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return decode_jpeg(encoded, mode=ImageReadMode.GRAY if grey else ImageReadMode.RGB)
        except RuntimeError as error:
            reason = str(error).rpartition(", ")[2]
            raise BadClip(f"{name}: does not decode ({reason})") from error


_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset((0x00, 0x01, *range(0xD0, 0xDA), 0xFF))

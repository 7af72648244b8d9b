"""Compute the optical flow of one clip, check its images, and write them as a folder of files or as one tar file."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipelines.decoding.shard_reader import INDEX_DTYPE
from pipelines.decoding.tar import BLOCK_BYTES, TarWriter
from pipelines.errors import BadClip
from pipelines.jpeg_clips import COMPONENT, JPEG_COLOURS, JPEG_FLOW
from pipelines.manifest import SHARD_SUFFIX, ManifestRow, image_file
from pipelines.prepare.repack.clip_task import ClipTask, atomic_folder
from pipelines.prepare.repack.rescale import scaled_images
from pipelines.prepare.repack.shard_file import add_images
from runtime.atomic_write import atomic_write

from .optical_flow import FlowField, Grey, flow_estimator, to_levels

SHORT_SIDE = 256
"""Pixels of the shorter side, before flow is computed. TSN's tool is run with 340 x 256."""
_FIRST_NUMBER = 1
_JPEG_QUALITY = 95
"""OpenCV's default, which TSN's tool leaves as it is."""
_MAX_DIFFERENCE = 4.0
"""Mean grey levels between an image and its decoded JPEG: 0.6 pixels of displacement."""


def flow_size(row: ManifestRow) -> tuple[int, int]:
    """Return the upright (width, height) of a clip's flow: the shorter side SHORT_SIDE, or as it is where it is smaller."""
    width, height = row.upright_size
    scale = min(1.0, SHORT_SIDE / min(width, height))
    return round(width * scale), round(height * scale)


@dataclass(frozen=True)
class FlowTask(ClipTask):
    """The task of computing one clip's flow."""

    method: str
    tar: bool
    """Write one tar file, in the form of a shard, in place of a folder of images."""

    @property
    def path(self) -> Path:
        return self.target / (self.stem + SHARD_SUFFIX if self.tar else self.stem)

    def find_row(self, source: ManifestRow) -> ManifestRow | None:
        row = self._new_row(source)
        try:
            length = self._length_of_tar(row) if self.tar else self._length_of_files(row)
        except OSError:
            return None
        return replace(row, length=length) if length else None

    def _new_row(self, source: ManifestRow) -> ManifestRow:
        """Return the row of the clip, without its length."""
        path, offset = f"{self.stem}/flow_{COMPONENT}_%05d.jpg", _FIRST_NUMBER
        if self.tar:
            path, offset = self.stem + SHARD_SUFFIX, BLOCK_BYTES
        pairs, size = source.num_frames - 1, flow_size(source)
        return ManifestRow(path, offset, 0, source.label, pairs, JPEG_FLOW, *size, 0, *JPEG_COLOURS)

    def _length_of_files(self, row: ManifestRow) -> int:
        """Return the bytes of all images; 0 if one is empty. Raises OSError if one is missing."""
        sizes = [os.stat(image_file(self.target / row.path, row, image)).st_size for image in range(row.num_images)]
        return sum(sizes) if all(sizes) else 0

    def _length_of_tar(self, row: ManifestRow) -> int:
        """Return the length of the clip in its tar file; 0 if the file is too short. Raises OSError if it is missing."""
        with open(self.path, "rb") as file:
            file.seek(row.offset)
            index = file.read(row.num_images * INDEX_DTYPE.itemsize)
            size = os.fstat(file.fileno()).st_size
        if len(index) < row.num_images * INDEX_DTYPE.itemsize:
            return 0
        last = np.frombuffer(index, INDEX_DTYPE)[-1]
        length = int(last["start"] + last["length"])
        return length if size > row.offset + length else 0

    def write(self, root: Path, source: ManifestRow) -> None:
        if source.num_frames < 2:
            raise BadClip(f"{root / source.path}: has one frame, and optical flow needs two")
        images, row = _flow_images(root, source, self.method), self._new_row(source)
        if self.tar:
            with atomic_write(self.path) as file:
                writer = TarWriter(file)
                add_images(writer, f"{self.number:09d}", list(images))
                writer.finish()
            return
        with atomic_folder(self.path) as folder:
            for number, content in enumerate(images):
                (folder / image_file(Path(row.path), row, number).name).write_bytes(content)


def _flow_images(root: Path, row: ManifestRow, method: str) -> Iterator[bytes]:
    """Yield the encoded images x1, y1, x2, y2 and so on of a clip's flow."""
    for flow_HW2 in _flow_fields(root, row, method):
        for displacement_HW in np.moveaxis(flow_HW2, -1, 0):
            yield encode_image(str(root / row.path), to_levels(displacement_HW))


def _flow_fields(root: Path, row: ManifestRow, method: str) -> Iterator[FlowField]:
    """Yield the flow from each upright, scaled frame to the next one."""
    import cv2

    size = flow_size(row)
    estimate = flow_estimator(method, min(size))
    greys = (cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY) for image_HWC in scaled_images(root, row, size))
    for first_HW, second_HW in pairwise(greys):
        try:
            yield estimate(first_HW, second_HW)
        except cv2.error as error:
            reason = f"OpenCV's {method} cannot work on {size[0]}x{size[1]} pixels ({error.err})"
            raise BadClip(f"{root / row.path}: {reason}") from error


def encode_image(name: str, level_HW: Grey) -> bytes:
    """Encode a grey JPEG image, and check what it decodes to. Raises BadClip if that differs too much."""
    import cv2

    content = cv2.imencode(".jpg", level_HW, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
    decoded_HW = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    difference = np.abs(decoded_HW.astype(np.int16) - level_HW).mean()
    if difference > _MAX_DIFFERENCE:
        raise BadClip(f"{name}: a JPEG image of its flow differs by {difference:.1f} grey levels on average")
    return content.tobytes()

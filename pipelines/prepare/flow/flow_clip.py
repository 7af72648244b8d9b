"""Compute the optical flow of one clip, check the written images, then rename their folder."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipelines.errors import BadClip
from pipelines.jpeg_clips import COMPONENT, JPEG_COLOURS, JPEG_FLOW
from pipelines.manifest import ManifestRow
from pipelines.prepare.repack.clip_task import ClipTask, atomic_folder
from pipelines.prepare.repack.rescale import scaled_images

from .optical_flow import FlowField, Grey, flow_estimator, to_levels

SHORT_SIDE = 256
"""Pixels of the shorter side, before flow is computed. TSN's tool is run with 340 x 256."""
FIRST_NUMBER = 1
_FILE_NAME = f"flow_{COMPONENT}_%05d.jpg"
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

    @property
    def path(self) -> Path:
        return self.target / self.stem

    def find_row(self, source: ManifestRow) -> ManifestRow | None:
        pairs = source.num_frames - 1
        numbers = range(FIRST_NUMBER, FIRST_NUMBER + pairs)
        try:
            sizes = [os.stat(self.path / file_name(xy, number)).st_size for number in numbers for xy in "xy"]
        except OSError:
            return None
        if not sizes or not all(sizes):
            return None
        place = f"{self.stem}/{_FILE_NAME}", FIRST_NUMBER, sum(sizes)
        return ManifestRow(*place, source.label, pairs, JPEG_FLOW, *flow_size(source), 0, *JPEG_COLOURS)

    def write(self, root: Path, source: ManifestRow) -> None:
        name = str(root / source.path)
        if source.num_frames < 2:
            raise BadClip(f"{name}: has one frame, and optical flow needs two")
        with atomic_folder(self.path) as folder:
            for number, flow_HW2 in enumerate(_flow_fields(root, source, self.method), start=FIRST_NUMBER):
                for xy, displacement_HW in zip("xy", np.moveaxis(flow_HW2, -1, 0), strict=True):
                    write_image(folder / file_name(xy, number), to_levels(displacement_HW))


def file_name(xy: str, number: int) -> str:
    """Return the name of a flow image: of the component `x` or `y`, from frame `number` to the next one (from 1)."""
    return _FILE_NAME.replace(COMPONENT, xy) % number


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


def write_image(path: Path, level_HW: Grey) -> None:
    """Write a grey JPEG file, and check what it decodes to."""
    import cv2

    encoded = cv2.imencode(".jpg", level_HW, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
    path.write_bytes(encoded.tobytes())
    decoded_HW = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded_HW is None or decoded_HW.shape != level_HW.shape:
        raise BadClip(f"{path}: does not decode after it was written")
    difference = np.abs(decoded_HW.astype(np.int16) - level_HW).mean()
    if difference > _MAX_DIFFERENCE:
        raise BadClip(f"{path}: decodes to other values, by {difference:.1f} grey levels on average")

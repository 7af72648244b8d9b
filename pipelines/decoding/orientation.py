"""Read how stored frames are turned and mirrored for display, and make decoded frames upright."""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.manifest import ManifestRow

# (a, b, c, d) of a display matrix without its scale -> (rotation, mirrored). The point x, y of the stored frame, with y
# downwards, is shown at a x + c y, b x + d y.
_ORIENTATIONS = {
    (1, 0, 0, 1): (0, False),
    (0, -1, 1, 0): (90, False),
    (-1, 0, 0, -1): (180, False),
    (0, 1, -1, 0): (270, False),
    (-1, 0, 0, 1): (0, True),
    (0, 1, 1, 0): (90, True),
    (1, 0, 0, -1): (180, True),
    (0, -1, -1, 0): (270, True),
}
# Rounding of the matrix's numbers by the program that wrote it.
_TOLERANCE = 0.01


def frame_orientation(frame: Any) -> tuple[int, bool]:
    """Return (rotation, mirrored) of a PyAV frame, as in a manifest row, from its display matrix.

    Raises ValueError for a matrix that does more than turn by quarters, mirror and scale evenly.
    """
    # By key: iterating over side_data yields values in PyAV 18 and keys in PyAV 19.
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    return _orientation((a, b, c, d))


def _orientation(matrix: tuple[int, int, int, int]) -> tuple[int, bool]:
    """Find the orientation of (a, b, c, d). FFmpeg ignores the scale, so it is ignored here."""
    scale = max(map(abs, matrix))
    parts = [part / scale for part in matrix] if scale else [0.0]
    nearest = tuple(map(round, parts))
    if nearest not in _ORIENTATIONS or any(
        abs(part - whole) > _TOLERANCE for part, whole in zip(parts, nearest, strict=True)
    ):
        shown = ", ".join(f"{part / (1 << 16):.3g}" for part in matrix)
        raise ValueError(f"its display matrix ({shown}) is not one of the 8 of quarter turns and mirroring")
    return _ORIENTATIONS[nearest]  # type: ignore[index]


def upright(image_HWC: NDArray[np.uint8], row: ManifestRow) -> NDArray[np.uint8]:
    """Return a view of one or more stored frames (..., H, W, C) as they are shown."""
    return turned(image_HWC, row.rotation, row.mirrored)


def turned(image_HWC: NDArray[np.uint8], rotation: int, mirrored: bool) -> NDArray[np.uint8]:
    """Return a view of one or more stored frames (..., H, W, C), mirrored and then turned counter-clockwise by `rotation`."""
    mirrored_HWC = image_HWC[..., ::-1, :] if mirrored else image_HWC
    return np.rot90(mirrored_HWC, rotation // 90, axes=(-3, -2))

"""Optical flow between grey images with OpenCV, and its form of 8 bits.

A flow field has the displacement in pixels (x to the right, y down) of each pixel of the first image.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.prepare.errors import DataSetError

Grey = NDArray[np.uint8]
"""(H, W)."""
FlowField = NDArray[np.float32]
"""(H, W, 2): x and y."""

BOUND_PX = 20.0
"""The largest displacement that the 8 bits hold; larger ones are clipped to it. TSN's tool has the same bound."""
METHODS = ("dis", "tvl1")
_FULL_RESOLUTION_BELOW = 128
"""Pixels of the shorter side."""
_INSTALL = "pip install -c constraints.txt opencv-contrib-python-headless (the extra `flow`)"


def require_method(method: str) -> None:
    """Raise DataSetError, with the fix, if OpenCV is missing here or lacks the method."""
    try:
        import cv2
    except ImportError as error:
        raise DataSetError(f"optical flow needs OpenCV ({error}). Fix: {_INSTALL}") from error
    if method == "tvl1" and not hasattr(cv2, "optflow"):
        # Two of OpenCV's packages share one folder, and removing one breaks the other.
        raise DataSetError(
            "--method tvl1: the installed OpenCV lacks TV-L1, which only its contrib package has. "
            f"Fix: pip uninstall opencv-python opencv-python-headless, then {_INSTALL}"
        )


def flow_estimator(method: str, short_side: int) -> Callable[[Grey, Grey], FlowField]:
    """Return the function that computes the flow from one image to another, whose shorter side is `short_side`.

    The function raises cv2.error for images that are too small.
    """
    import cv2

    # Each process works on its own clip.
    cv2.setNumThreads(1)
    algorithm: Any
    if method == "tvl1":
        algorithm = cv2.optflow.DualTVL1OpticalFlow.create()
    else:
        algorithm = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        # The preset stops at half of the resolution, where the motion in a small image is lost.
        if short_side < _FULL_RESOLUTION_BELOW:
            algorithm.setFinestScale(0)
    return lambda first_HW, second_HW: algorithm.calc(first_HW, second_HW, None)


def to_levels(displacement_HW: NDArray[np.float32]) -> Grey:
    """Map displacements of -20 to 20 pixels linearly to 0 to 255, rounding half up: 0 becomes 128. Clip larger ones."""
    share_HW = (np.clip(displacement_HW, -BOUND_PX, BOUND_PX) + BOUND_PX) / (2 * BOUND_PX)
    return np.floor(share_HW * 255 + 0.5).astype(np.uint8)


def to_displacement(level_HW: Grey) -> NDArray[np.float32]:
    """Map levels back to displacements in pixels, to the nearest 0.08."""
    return level_HW.astype(np.float32) * (2 * BOUND_PX / 255) - BOUND_PX

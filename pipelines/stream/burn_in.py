"""Training samples for a live stream (`pipeline.sampling=stream`): a clip at a sampled frame distance, after frames of another.

A camera never resets the network, and no frame says that a clip begins. So each training clip follows `burn_in` frames of another
clip. Which clip, the distance between frames and the first frame (the phase) are pure functions of (seed, epoch, row).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StreamSampling:
    """The settings of `sampling=stream`; part of the recipe."""

    burn_in: int
    """Frames of another clip before each clip."""
    distances: tuple[int, ...]
    """Distances between neighbouring frames, in frames of the clip, one of which is sampled."""
    loss_from: int
    """First frame of the clip, counted from 1, whose logits the loss takes."""
    score_burn_in: bool = False
    """The loss takes the burn-in's frames too, from the same number on."""

    @property
    def scored(self) -> slice:
        """The frames of a training sample, which begins with the burn-in, that are scored as the clip's."""
        return slice(self.burn_in + self.loss_from - 1, None)

    @property
    def scored_burn_in(self) -> slice | None:
        """The frames that are scored as the burn-in's; None: the loss takes none of them."""
        return slice(self.loss_from - 1, self.burn_in) if self.score_burn_in else None

    def distance(self, uniform: float) -> int:
        """Return the distance that a random number in [0, 1) selects."""
        return self.distances[int(uniform * len(self.distances))]


def stream_training(num_frames: int, count: int, distance: int, uniform: float) -> NDArray[np.int64]:
    """Take `count` frames of a clip of `num_frames`, `distance` apart, from a random first frame on.

    A clip that is too short gets the largest distance that fits. One of fewer than `count` frames repeats its last frame.
    """
    if count > 1:
        distance = max(1, min(distance, (num_frames - 1) // (count - 1)))
    starts = max(1, num_frames - (count - 1) * distance)
    return np.minimum(int(uniform * starts) + np.arange(count, dtype=np.int64) * distance, num_frames - 1)


def other_row(num_rows: int, row: int, uniform: float) -> int:
    """Choose another row than `row`, each with the same probability. The only row of a manifest is its own other row."""
    return (row + 1 + int(uniform * (num_rows - 1))) % num_rows

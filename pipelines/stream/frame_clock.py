"""Choose frames of a live source by their times, so that the network sees the frame distance it was trained for.

A camera's frame rate is not the training videos', and it changes with the light. So frames are chosen by time, not by number.
"""

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class FrameClock:
    """A pure function of the times of all frames so far: it takes the nearest frame to each due time.

    Due times are `interval_s` apart, from the first frame on. A frame is the nearest if the next one, expected after the same gap
    as this one, is farther, so no frame is held back. Frames that are taken are at least a third of an interval apart. A source
    slower than the interval has all its frames taken. After a pause, due times that have passed are left out.
    """

    interval_s: float
    due_s: float | None = None
    """The next due time; None before the first frame."""
    last_s: float = 0.0
    """Time of the last frame, taken or not."""

    def at(self, time_s: float) -> tuple[bool, Self]:
        """Return whether to take the frame of this time, and the clock for the next frame."""
        gap_s = time_s - self.last_s
        if self.due_s is None or gap_s < 0:
            # The first frame, or a source that has begun again.
            return True, replace(self, due_s=time_s + self.interval_s, last_s=time_s)
        if time_s + gap_s / 2 < self.due_s:
            return False, replace(self, last_s=time_s)
        passed = max(0, round((time_s - self.due_s) / self.interval_s))
        return True, replace(self, due_s=self.due_s + (passed + 1) * self.interval_s, last_s=time_s)

"""Estimate the time to the end of a run."""

from collections import deque
from collections.abc import Collection

# Enough to average out a burst of other work, few enough to follow a change.
_RECENT_RECORDS = 20


class Eta:
    """The time to the end of a run, from its recent steps and its last evaluation."""

    def __init__(self, last_step: int, evaluation_steps: Collection[int]) -> None:
        """`evaluation_steps`: numbers of steps after which an evaluation is due."""
        self._last_step, self._evaluation_steps = last_step, evaluation_steps
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_RECORDS)
        self._evaluation_s = 0.0

    def add(self, steps: int, duration_s: float) -> None:
        """Take the next `steps` steps of a training record."""
        self._recent.append((steps, duration_s))

    def evaluated(self, duration_s: float) -> None:
        """Take the duration of the newest evaluation, with its checkpoint."""
        self._evaluation_s = duration_s

    def seconds(self, step: int) -> float:
        """Return the time from now, after `step` steps, to the end. Call it after the first record's `add`."""
        steps, duration_s = map(sum, zip(*self._recent, strict=True))
        step_s = duration_s / max(1, steps)
        evaluations = sum(step <= due <= self._last_step for due in self._evaluation_steps)
        return (self._last_step - step) * step_s + evaluations * self._evaluation_s


def duration_text(seconds: float) -> str:
    """Return a duration as 2 d 03:04:05 or 3:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hour:{'02d' if days else 'd'}}:{minute:02d}:{second:02d}"

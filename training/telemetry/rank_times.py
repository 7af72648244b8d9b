"""The times of all ranks in a log interval: their percentiles, the worst rank, and what limits the throughput.

Shapes: R ranks, V values of a rank. Times are in seconds per step.
"""

from typing import Any

from torch import Tensor

from .step_clock import StepTimes

# A smaller part of the step is not worth naming.
_NAMED_SHARE = 0.1


def rank_values(times: StepTimes, input_wait_s: float, peak_memory_bytes: int) -> list[float]:
    """Return what a rank sends to all ranks. `input_wait_s` is per step already."""
    seconds = (times.own_s, times.messages_s, times.phases_s["reduction_wait"])
    return [*(each / max(1, times.steps) for each in seconds), input_wait_s, float(peak_memory_bytes)]


class RankTimes:
    """What all ranks have sent, as `rank_values` orders it."""

    def __init__(self, values_VR: Tensor) -> None:
        self.own_R, self._messages_R, self._reduction_wait_R, self.input_wait_R, self._memory_R = values_VR

    def fields(self, step_s: float) -> dict[str, Any]:
        """Return the fields of a training record; `busy` is a rank's own time."""
        p50, p90, most = self.own_R.quantile(
            self.own_R.new_tensor([0.5, 0.9, 1.0]),
            # The time of a rank. Of two ranks the median is the faster one's.
            interpolation="nearest",
        ).tolist()
        return {
            "busy_p50_s": p50,
            "busy_p90_s": p90,
            "busy_max_s": most,
            "worst_rank": int(self.own_R.argmax()),
            "peak_memory_bytes": int(self._memory_R.max()),
            "limited_by": self._limited_by(step_s),
        }

    def _limited_by(self, step_s: float) -> str:
        """Name the input if any rank's stall is a tenth of the step or more, then the largest other such loss, else compute.

        Every rank waits for the reduction at least as long as the last one, which waits for the network only. The excess of the
        slowest rank over the median rank is lost on all others. A rank that waits for clips is slow for that reason.
        """
        losses = {
            "all-reduce": self._reduction_wait_R.min().item(),
            "batch norm messages": self._messages_R.min().item(),
            f"rank {int(self.own_R.argmax())}": (self.own_R.max() - self.own_R.median()).item(),
        }
        if self.input_wait_R.max().item() >= _NAMED_SHARE * step_s:
            return "input"
        cause, loss_s = max(losses.items(), key=lambda item: item[1])
        return cause if loss_s >= _NAMED_SHARE * step_s else "compute"

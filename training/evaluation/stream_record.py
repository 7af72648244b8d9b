"""The record of a continuous evaluation: accuracy per frame distance, and the curves of early recognition.

Shapes as in continuous.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.stream.continuous import BEGINNINGS_PERCENT
from training.config.schema import ModelConfig

from .continuous import READINGS, StreamAnswers

Record = dict[str, Any]


def network_kind(model: ModelConfig) -> str:
    """Return the name of a network's kind that a legend shows."""
    if model.shift == "none":
        return "TSN"
    return "online TSM" if model.direction == "past" else "TSM"


def stream_rows(
    answers: StreamAnswers, label_N: Tensor, num_frames_N: NDArray[np.int64], distances: Sequence[int]
) -> list[Record]:
    """Return a row per frame distance: top-1 of each reading at the end of clips, and after each part of them (`early`)."""
    rows = []
    for number, distance in enumerate(distances):
        right_NPR = answers.predicted_NDPR[:, number] == label_N[:, None, None]
        shown_N = -(-num_frames_N // distance)
        early = {
            name: [_percent(right_NPR[:, part, reading], answers.seen_N) for part in range(len(BEGINNINGS_PERCENT))]
            for reading, name in enumerate(READINGS)
        }
        rows.append(
            {
                "distance": distance,
                "frames_per_clip": round(float(shown_N.mean()), 2),
                "clips_shorter_than_8": int((shown_N < 8).sum()),
                **{f"{name}_percent": percents[-1] for name, percents in early.items()},
                "early_percent": early,
            }
        )
    return rows


def clip_curve(
    source: str, step: int, model: ModelConfig, predicted_NV: Tensor, label_N: Tensor, seen_N: Tensor
) -> Record:
    """Return the curve of early recognition of a network that samples its frames from the part that was seen."""
    right_NV = predicted_NV == label_N[:, None]
    return {
        "source": source,
        "step": step,
        "network": network_kind(model),
        "num_frames": model.num_frames,
        "top1_percent": [_percent(right_N, seen_N) for right_N in right_NV.T],
    }


def _percent(right_N: Tensor, seen_N: Tensor) -> float:
    """Return the percentage of the decoded clips that are right; 0 if there are none."""
    return 100 * int(right_N[seen_N].sum()) / max(1, int(seen_N.sum()))

"""Every score of an evaluation, as one function of each clip's logits, so that it cannot depend on the world that made them.

Shapes: N clips of the manifest, M of them that were seen, K classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClipLogits:
    """Logits of a manifest's clips by row, averaged over each clip's views: `logit_NK`, `label_N` int64, and `seen_N` bool:
    False for a clip that could not be decoded, whose logits mean nothing."""

    logit_NK: Tensor
    label_N: Tensor
    seen_N: Tensor

    def seen(self) -> tuple[Tensor, Tensor]:
        """`(logit_MK, label_M)` of the clips that count, on the CPU."""
        seen_N = self.seen_N.cpu()
        return self.logit_NK.cpu()[seen_N], self.label_N.cpu()[seen_N]


@dataclass(frozen=True)
class Scores:
    """Results over `clips` counted clips; `missing` could not be decoded.

    `mean_class_percent`: mean of the accuracies of the classes that have clips. `calibration_error_percent`: the expected
    calibration error of the most likely class in 15 bins (Guo et al., arXiv:1706.04599). `order_group_percent`: answers in the
    right group of classes that differ only in the order of their frames (None where the data set has no such groups).
    """

    clips: int
    missing: int
    loss: float
    top1_percent: float
    top5_percent: float
    mean_class_percent: float
    calibration_error_percent: float
    order_group_percent: float | None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def describe(self, title: str) -> str:
        """A line for people."""
        group = "" if self.order_group_percent is None else f"  right order-pair {self.order_group_percent:.1f}%"
        missing = f"  MISSING {self.missing}" if self.missing else ""
        accuracy = f"top-1 {self.top1_percent:.1f}%  top-5 {self.top5_percent:.1f}%{group}"
        return f"{title}  {accuracy}  loss {self.loss:.4f}  ({self.clips} clips){missing}"


def scores_of(clip_logits: ClipLogits, order_groups: list[int] | None) -> Scores:
    """All scores, computed on the CPU; `order_groups`: the group of each class."""
    # Rank 0 alone scores, so the others need not spend the seconds that this import takes.
    from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_stat_scores

    logit_MK, label_M = clip_logits.seen()
    clips, classes = logit_MK.shape
    missing = len(clip_logits.seen_N) - clips
    if clips == 0:
        return Scores(0, missing, 0.0, 0.0, 0.0, 0.0, 0.0, None if order_groups is None else 0.0)
    confusion_KK = confusion_matrix(clip_logits)
    clips_K, right_K = confusion_KK.sum(1), confusion_KK.diagonal()
    with_clips = clips_K > 0
    top5 = multiclass_stat_scores(logit_MK, label_M, classes, average="micro", top_k=min(5, classes))[0]
    logp_MK = logit_MK.double().log_softmax(1)
    calibration_error = multiclass_calibration_error(logp_MK.exp(), label_M, classes, n_bins=_CALIBRATION_BINS)
    in_group = None
    if order_groups is not None:
        group_K = torch.tensor(order_groups)
        in_group = 100 * int(confusion_KK[group_K[:, None] == group_K[None, :]].sum()) / clips
    return Scores(
        clips=clips,
        missing=missing,
        loss=torch.nn.functional.nll_loss(logp_MK, label_M).item(),
        top1_percent=100 * int(right_K.sum()) / clips,
        top5_percent=100 * int(top5) / clips,
        mean_class_percent=100 * (right_K[with_clips].double() / clips_K[with_clips]).mean().item(),
        calibration_error_percent=100 * calibration_error.item(),
        order_group_percent=in_group,
    )


def confusion_matrix(clip_logits: ClipLogits) -> Tensor:
    """int64 (K, K): how many clips of a class (row) were answered with a class (column).

    Not torchmetrics', which in torch's deterministic mode compares each clip with each cell: 26 GB for Kinetics.
    """
    logit_MK, label_M = clip_logits.seen()
    classes = logit_MK.shape[1]
    return torch.bincount(label_M * classes + logit_MK.argmax(1), minlength=classes * classes).view(classes, classes)

"""Compute the scores of an evaluation from the logits of each clip, so that they do not depend on the world size.

Clips of a test split may have no labels. Then an evaluation counts clips, and has no scores.

Shapes: N clips of the manifest, M clips that could be decoded, K classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.manifest import UNLABELLED

_CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClipLogits:
    """Logits of a manifest's clips, by row."""

    logit_NK: Tensor
    """Mean over each clip's views."""
    label_N: Tensor
    """int64; all of them UNLABELLED (pipelines.manifest) if the clips have no labels."""
    seen_N: Tensor
    """bool: False for a clip that could not be decoded; its logits are 0."""

    @property
    def labelled(self) -> bool:
        """The labels of the clips are known."""
        return bool((self.label_N.cpu() != UNLABELLED).all())

    def seen(self) -> tuple[Tensor, Tensor]:
        """Return `(logit_MK, label_M)` of the decoded clips, on the CPU."""
        seen_N = self.seen_N.cpu()
        return self.logit_NK.cpu()[seen_N], self.label_N.cpu()[seen_N]


@dataclass(frozen=True)
class Counts:
    """Numbers of clips: all that an evaluation of clips without labels has."""

    clips: int
    """Number of decoded clips."""
    missing: int
    """Number of clips that could not be decoded."""

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def describe(self, title: str) -> str:
        """Return the numbers as one line to read."""
        return f"{title}  no labels, so no accuracy  {self._clips()}"

    def _clips(self) -> str:
        return f"({self.clips} clips)" + (f"  MISSING {self.missing}" if self.missing else "")


@dataclass(frozen=True)
class Scores(Counts):
    """Scores over the decoded clips."""

    loss: float
    top1_percent: float
    top5_percent: float
    mean_class_percent: float
    """Mean accuracy per class, over the classes that have clips."""
    calibration_error_percent: float
    """Expected calibration error of the predicted class in 15 bins (Guo et al., arXiv:1706.04599)."""
    order_group_percent: float | None
    """Predictions in the right group of classes that differ only in the order of their frames; None: the data set has no groups."""

    def describe(self, title: str) -> str:
        """Return the main scores as one line to read."""
        group = "" if self.order_group_percent is None else f"  right order-pair {self.order_group_percent:.1f}%"
        accuracy = f"top-1 {self.top1_percent:.1f}%  top-5 {self.top5_percent:.1f}%{group}"
        return f"{title}  {accuracy}  loss {self.loss:.4f}  {self._clips()}"


def counts_of(clip_logits: ClipLogits, order_groups: list[int] | None) -> Counts:
    """Compute all scores, or only count the clips if they have no labels."""
    if clip_logits.labelled:
        return scores_of(clip_logits, order_groups)
    clips = int(clip_logits.seen_N.cpu().sum())
    return Counts(clips, len(clip_logits.seen_N) - clips)


def scores_of(clip_logits: ClipLogits, order_groups: list[int] | None) -> Scores:
    """Compute all scores of labelled clips, on the CPU. `order_groups`: the group of each class."""
    # This import takes seconds, and only rank 0 needs it.
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
    """Return int64 (K, K): the number of clips of each class (row) for each predicted class (column).

    torchmetrics' function is not used: in torch's deterministic mode it compares each clip with each cell, 26 GB for Kinetics.
    """
    logit_MK, label_M = clip_logits.seen()
    classes = logit_MK.shape[1]
    return torch.bincount(label_M * classes + logit_MK.argmax(1), minlength=classes * classes).view(classes, classes)

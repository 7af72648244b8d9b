"""Exact counts of an evaluation, gathered over ranks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distributed.backend import Backend


@dataclass(frozen=True)
class Scores:
    """Results over `clips` counted clips; `missing` could not be decoded. `order_group_percent`: answers in the right group
    of classes that differ only in the order of their frames (None where the data set has no such groups)."""

    clips: int
    missing: int
    loss: float
    top1_percent: float
    top5_percent: float
    mean_class_percent: float
    order_group_percent: float | None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


class Counter:
    """Adds up an evaluation on the device; `scores` joins all ranks by one all-reduce of whole numbers and one of the loss."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._confusion_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)  # [label, answer]
        self._top5 = torch.zeros((), dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._missing = 0

    def add(self, logit_NK: Tensor, label_N: Tensor, real_N: Tensor, missing: int) -> None:
        """Count the clips of a batch that are real."""
        self._missing += missing
        classes = logit_NK.shape[1]
        answer_N = logit_NK.argmax(1)
        cell_N = label_N * classes + answer_N
        self._confusion_KK.view(-1).index_add_(0, cell_N, real_N.to(torch.int64))
        top_NM = logit_NK.topk(min(5, classes), 1).indices
        self._top5 += ((top_NM == label_N[:, None]).any(1) & real_N).sum()
        loss_N = torch.nn.functional.cross_entropy(logit_NK.double(), label_N, reduction="none")
        self._loss += torch.where(real_N, loss_N, 0.0).sum()

    def scores(self, backend: Backend, order_groups: list[int] | None) -> Scores:
        """Scores over all ranks; the same on each."""
        device = self._confusion_KK.device
        whole = torch.cat([self._confusion_KK.view(-1), self._top5[None], torch.tensor([self._missing], device=device)])
        backend.all_reduce_(whole, "evaluation.counts")
        loss = self._loss[None].clone()
        backend.all_reduce_(loss, "evaluation.loss")
        confusion_KK = whole[:-2].view_as(self._confusion_KK).cpu()
        top5, missing = whole[-2:].tolist()
        clips = int(confusion_KK.sum())
        per_class_K = confusion_KK.sum(1)
        right_K = confusion_KK.diagonal()
        seen = per_class_K > 0
        in_group = None
        if order_groups is not None:
            group_K = torch.tensor(order_groups)
            in_group = int(confusion_KK[group_K[:, None] == group_K[None, :]].sum())
        return Scores(
            clips=clips,
            missing=missing,
            loss=loss.item() / max(1, clips),
            top1_percent=_percent(int(right_K.sum()), clips),
            top5_percent=_percent(top5, clips),
            mean_class_percent=100 * (right_K[seen] / per_class_K[seen]).mean().item() if clips else 0.0,
            order_group_percent=None if in_group is None else _percent(in_group, clips),
        )


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0

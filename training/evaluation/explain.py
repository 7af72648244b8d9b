"""Compute what a network makes of the order of a clip's frames: logits as they are, reversed and shuffled.

Shapes: V views of a clip, T frames, K classes, S shuffles.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.loading.clips import EvaluationClips
from pipelines.stream.counter_rng import key_of
from pipelines.stream.order import permute
from training.build.normalise import Normaliser
from training.build.numerics import autocast
from training.config.schema import Config, EvaluationConfig
from training.report.explain_page import ShownClip, write_explain_page

from .evaluate import mean_over_views
from .metrics import ClipLogits

_SHUFFLES = 8


def explain_evaluation(
    page: Path,
    scores: str,
    network: nn.Module,
    clips: EvaluationClips,
    clip_logits: ClipLogits,
    device: torch.device,
    config: Config,
    progress: Callable[[], None],
) -> None:
    """Write a page with some of the clips that were evaluated (`choose_rows`). `scores`: a line about all of them."""
    rows = choose_rows(clip_logits, config.evaluation.explain)
    normalise = Normaliser(device, config.numerics, config.model.modality)
    shown = list(explain_clips(network, normalise, clips, rows, device, config.evaluation, progress))
    write_explain_page(
        page, f"{page.parent.name}: frames in order, reversed, shuffled", scores, shown, clips.source.manifest.classes
    )


@torch.inference_mode()
def explain_clips(
    network: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    clips: EvaluationClips,
    rows: Sequence[int],
    device: torch.device,
    settings: EvaluationConfig,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[ShownClip]:
    """Explain the clips of these rows, leaving out those that cannot be decoded. Decodes in this process.

    Logits are means over a clip's views, each with its frames in the same order. The shuffles are the same for every clip.
    Leaves the network in evaluation mode. `progress` is called before each order of a clip's frames.
    """
    network.eval()
    manifest = clips.source.manifest
    shuffles = shuffled_orders(clips.protocol.num_frames)
    for row in rows:
        (clip,), real_N, _ = clips.clips((np.array([row]), np.array([True])))
        if not real_N[0]:
            continue

        def logits_of(order_T: NDArray[np.int64], video_VTCHW: Tensor = clip.content) -> Tensor:
            progress()
            parts = video_VTCHW[:, order_T].split(settings.batch)
            with autocast(device, settings.amp):
                logit_VK = torch.cat([network(normalise(part_VTCHW)).float() for part_VTCHW in parts])
            return mean_over_views(logit_VK[None], clips.mirror)[0].cpu()

        forward_T = np.arange(clips.protocol.num_frames)
        as_is_K = logits_of(forward_T)
        yield ShownClip(
            name=manifest.row(row).path,
            true_class=manifest.classes[clip.label],
            frame_TCHW=clip.content[0],
            as_is_K=as_is_K,
            reversed_K=logits_of(forward_T[::-1].copy()),
            shuffled_SK=torch.stack(list(map(logits_of, shuffles))) if shuffles else as_is_K.new_empty(0, len(as_is_K)),
        )


def shuffled_orders(num_frames: int) -> list[NDArray[np.int64]]:
    """Return different orders of frames that are neither the order itself nor its reverse; fewer if there are fewer."""
    forward = list(range(num_frames))
    left_out = [forward, forward[::-1]]
    orders: list[NDArray[np.int64]] = []
    for attempt in range(10 * _SHUFFLES):
        order = permute(np.arange(num_frames), num_frames, key_of(attempt))
        if order.tolist() not in left_out and len(orders) < _SHUFFLES:
            left_out.append(order.tolist())
            orders.append(order)
    return orders


def choose_rows(clip_logits: ClipLogits, count: int) -> list[int]:
    """Choose clips to show: up to half of them the surest mistakes, the others right answers of as many classes as possible."""
    score_NK = clip_logits.logit_NK.detach().cpu().double().softmax(1)
    label_N, seen_N = clip_logits.label_N.cpu(), clip_logits.seen_N.cpu()
    score_N, answer_N = score_NK.max(1)
    wrong_N = seen_N & (answer_N != label_N)
    by_score = score_N.argsort(descending=True, stable=True).tolist()
    wrong = [row for row in by_score if wrong_N[row]]
    by_class: dict[int, list[int]] = {}
    for row in (seen_N & ~wrong_N).nonzero().flatten().tolist():
        by_class.setdefault(int(label_N[row]), []).append(row)
    # The first of each class, then the second of each, and so on.
    right = [
        row
        for _, _, row in sorted((turn, label, row) for label, rows in by_class.items() for turn, row in enumerate(rows))
    ]
    mistakes = wrong[: max(count // 2, count - len(right))]
    return mistakes + right[: count - len(mistakes)]

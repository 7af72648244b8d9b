"""The exact evaluation of a network over a manifest, on any number of ranks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distributed.backend import Backend
from pipelines.loader import BadClipRecord, ClipLoader, EvaluationClips
from pipelines.order import evaluation_rows

from .metrics import Counter, Scores


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    clips: EvaluationClips,
    loader: ClipLoader,
    backend: Backend,
    batch: int,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Scores, list[BadClipRecord]]:
    """Scores over every clip of the manifest, each counted once, and this rank's undecodable clips.

    No rank waits for another before the counts are joined at the end. `progress` hears the number of batches done.
    """
    manifest = clips.source.manifest
    plan = evaluation_rows(len(manifest), batch, backend.topology.rank, backend.topology.size)
    counter = Counter(len(manifest.classes), backend.device)
    missing: list[BadClipRecord] = []
    was_training = network.training
    network.eval()
    for done, clip_batch in enumerate(loader.batches(plan), start=1):
        logit_NK = network(normalise(clip_batch.video_NTCHW))
        label_N, real_N = (x_N.to(backend.device, non_blocking=True) for x_N in (clip_batch.label_N, clip_batch.real_N))
        counter.add(logit_NK, label_N, real_N, len(clip_batch.bad_clips))
        missing.extend(clip_batch.bad_clips)
        progress(done)
    network.train(was_training)
    return counter.scores(backend, manifest.order_groups), missing

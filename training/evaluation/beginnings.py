"""Evaluate a network on the beginnings of clips: the curves of early recognition.

Shapes: N clips of the manifest, M clips of a batch that are no padding, V views of a clip: one for each percentage that was seen.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distributed.backends.base import Backend
from pipelines.loading.clips import EvaluationClips
from training.build.data import Loader
from training.config.schema import EvaluationConfig

from .evaluate import batches_of_rank, logits_of_views


@torch.inference_mode()
def evaluate_beginnings(
    network: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    clips: EvaluationClips,
    loader: Loader,
    backend: Backend,
    settings: EvaluationConfig,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Return the class predicted from each beginning of each clip, int32 (N, V), the same on every rank; collective.

    The views of `clips.protocol` are the beginnings. Clips that could not be decoded have class 0.
    """
    network.eval()
    manifest, views = clips.source.manifest, clips.protocol.views
    predicted_NV = torch.zeros(len(manifest), views, dtype=torch.int32, device=backend.device)
    for done, clip_batch in enumerate(batches_of_rank(clips, loader, backend, settings), start=1):
        logit_NVK = logits_of_views(network, normalise, clip_batch, views, settings, backend.device)
        real_M = clip_batch.real_N.nonzero().flatten()
        row_M = clip_batch.row_N[real_M].to(backend.device)
        predicted_NV[row_M] = logit_NVK[real_M.to(backend.device)].argmax(2).int()
        progress(done)
    backend.all_reduce_(predicted_NV, "evaluation.beginnings")
    return predicted_NV.cpu()

"""The logits of every clip of a manifest, on any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distributed.backends.base import Backend
from pipelines.loading.clips import BadClipRecord, EvaluationClips
from pipelines.stream.order import evaluation_rows
from training.build.data import Loader
from training.build.numerics import autocast

from .metrics import ClipLogits, Scores, scores_of


class EvaluationStopped(Exception):
    """An evaluation that was left before its end, because the job is to stop; all ranks raise it together."""


@dataclass(frozen=True)
class Evaluation:
    """The same on every rank; `missing`: every rank's clips that could not be decoded."""

    scores: Scores
    clip_logits: ClipLogits
    missing: list[BadClipRecord]


def assess(
    network: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    clips: EvaluationClips,
    loader: Loader,
    backend: Backend,
    batch: int,
    amp: str = "off",
    progress: Callable[[int], None] = lambda _: None,
    unwanted: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """`evaluate`, and what it comes to; rank 0 computes the scores."""
    clip_logits, missing = evaluate(network, normalise, clips, loader, backend, batch, amp, progress, unwanted)
    scores = scores_of(clip_logits, clips.source.manifest.order_groups) if backend.topology.rank == 0 else None
    everywhere = [record for part in backend.all_gather_objects(missing) for record in part]
    return Evaluation(backend.broadcast_object(scores), clip_logits, everywhere)


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    clips: EvaluationClips,
    loader: Loader,
    backend: Backend,
    batch: int,
    amp: str = "off",
    progress: Callable[[int], None] = lambda _: None,
    unwanted: Callable[[], bool] = lambda: False,
) -> tuple[ClipLogits, list[BadClipRecord]]:
    """Logits of every clip of the manifest, each from one rank, and this rank's undecodable clips.

    A clip's logits are the mean over its views, as in the official test code. The network takes at most `batch` views at once,
    whatever their number, under autocast where `amp` says so (evaluation.amp); logits and their means are float32 all the same,
    or float64 where the network is. `progress` hears the number of batches done; `unwanted` is asked before each.

    Each rank fills its rows of a zeroed (N, K) matrix; one sum over ranks then gathers them exactly, in the clips' order on
    every world, with no pickling: 32 MB for the 20,000 clips and 400 classes of Kinetics, of the size of a step's gradients.
    No rank waits for another before that. So a rank that hears that the job is to stop leaves its other batches out, and
    whether any has done so is what all ask first when they meet. Raises EvaluationStopped where it is so.
    """
    manifest = clips.source.manifest
    views = clips.protocol.views
    plan = evaluation_rows(len(manifest), max(1, batch // views), backend.topology.rank, backend.topology.size)
    double = next(network.parameters()).dtype == torch.float64
    shape = (len(manifest), len(manifest.classes))
    logit_NK = torch.zeros(shape, dtype=torch.float64 if double else torch.float32, device=backend.device)
    times_seen_N = torch.zeros(len(manifest), dtype=torch.int32)  # on the host, which knows the rows
    missing: list[BadClipRecord] = []
    was_training, left = network.training, False
    network.eval()
    for done, clip_batch in enumerate(loader.batches(plan), start=1):
        left = unwanted()
        if left:
            break
        with autocast(backend.device, amp):
            parts = [
                network(normalise(part_NTCHW)).to(logit_NK.dtype) for part_NTCHW in clip_batch.video_NTCHW.split(batch)
            ]
        mean_NK = torch.cat(parts).unflatten(0, (-1, views)).mean(1)
        real_M = clip_batch.real_N.nonzero().flatten()  # on the CPU, where it costs no wait for the device
        row_M = clip_batch.row_N[real_M]
        logit_NK[row_M.to(backend.device)] = mean_NK[real_M.to(backend.device)]
        times_seen_N[row_M] += 1
        missing.extend(clip_batch.bad_clips)
        progress(done)
    network.train(was_training)
    leave_together(backend, left)
    backend.all_reduce_(logit_NK, "evaluation.logits")
    seen_N = times_seen_N.to(backend.device)
    backend.all_reduce_(seen_N, "evaluation.seen")
    times_seen_N = seen_N.cpu()
    assert times_seen_N.max() <= 1, "a clip was evaluated twice"
    label_N = torch.from_numpy(manifest.labels().astype("int64")).to(backend.device)
    return ClipLogits(logit_NK, label_N, (times_seen_N > 0).to(backend.device)), missing


def leave_together(backend: Backend, unwanted: bool) -> None:
    """Raise EvaluationStopped on all ranks when any of them says so; collective."""
    leaving = torch.tensor([float(unwanted)], device=backend.device)
    backend.all_reduce_(leaving, "evaluation.unwanted")
    if leaving.item():
        raise EvaluationStopped

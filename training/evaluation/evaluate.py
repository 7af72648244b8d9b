"""Evaluate a network on every clip of a manifest, on any number of ranks.

Shapes: N clips of the manifest, M clips of a batch that are no padding, K classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distributed.backends.base import Backend
from pipelines.loading.clips import BadClipRecord, ClipBatch, EvaluationClips
from pipelines.stream.mirror_labels import Mirror
from pipelines.stream.order import evaluation_rows
from training.build.data import Loader
from training.build.numerics import autocast
from training.config.schema import EvaluationConfig

from .metrics import ClipLogits, Counts, Scores, counts_of


class EvaluationStopped(Exception):
    """Raised on all ranks together when an evaluation ends early because the job is to stop."""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation, the same on every rank."""

    counts: Counts
    """Scores if the clips have labels."""
    clip_logits: ClipLogits
    missing: list[BadClipRecord]
    """Undecodable clips, of all ranks."""

    @property
    def scores(self) -> Scores:
        """The scores of clips with labels."""
        assert isinstance(self.counts, Scores), "clips without labels have no scores"
        return self.counts


def evaluate(
    network: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    clips: EvaluationClips,
    loader: Loader,
    backend: Backend,
    settings: EvaluationConfig,
    progress: Callable[[int], None] = lambda _: None,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluate every clip of the manifest, each on one rank; collective.

    A clip's logits are the mean over its views, as in the official test code. The network takes at most `settings.batch` views
    at once, under autocast if `settings.amp` names a type. Logits and their means are float32, or float64 if the network is.
    `progress` receives the number of finished batches. `stop_wanted` is called before each batch.

    Raises EvaluationStopped on all ranks if `stop_wanted` returned True on any rank.
    """
    was_training = network.training
    network.eval()
    part = _evaluate_own_rows(network, normalise, clips, loader, backend, settings, progress, stop_wanted)
    network.train(was_training)
    stop_together(backend, part.stopped)
    clip_logits = _gather(part, clips, backend)
    manifest = clips.source.manifest
    fields = vars(counts_of(clip_logits, manifest.order_groups)) if backend.topology.rank == 0 else None
    counts = (Scores if manifest.labelled else Counts)(**backend.broadcast_object(fields))
    missing_by_rank = backend.all_gather_objects([vars(record) for record in part.missing])
    missing = [BadClipRecord(**fields) for records in missing_by_rank for fields in records]
    return Evaluation(counts, clip_logits, missing)


def stop_together(backend: Backend, stop_wanted: bool) -> None:
    """Raise EvaluationStopped on all ranks if any rank wants to stop; collective."""
    stops = torch.tensor([float(stop_wanted)], device=backend.device)
    backend.all_reduce_(stops, "evaluation.stop_wanted")
    if stops.item():
        raise EvaluationStopped


@dataclass
class _Part:
    """One rank's part of an evaluation; rows of other ranks are 0."""

    logit_NK: Tensor
    times_seen_N: Tensor
    """int32, on the CPU, where the rows are known."""
    missing: list[BadClipRecord]
    stopped: bool = False


@torch.inference_mode()
def _evaluate_own_rows(
    network: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    clips: EvaluationClips,
    loader: Loader,
    backend: Backend,
    settings: EvaluationConfig,
    progress: Callable[[int], None],
    stop_wanted: Callable[[], bool],
) -> _Part:
    """Compute the logits of this rank's clips. No rank waits for another rank here, so each may stop by itself."""
    manifest, views, mirror = clips.source.manifest, clips.protocol.views, clips.mirror
    dtype = dtype_of_logits(network)
    logit_NK = torch.zeros(len(manifest), len(manifest.classes), dtype=dtype, device=backend.device)
    part = _Part(logit_NK, torch.zeros(len(manifest), dtype=torch.int32), [])
    for done, clip_batch in enumerate(batches_of_rank(clips, loader, backend, settings), start=1):
        if stop_wanted():
            part.stopped = True
            break
        logit_NVK = logits_of_views(network, normalise, clip_batch, views, settings, backend.device)
        mean_NK = mean_over_views(logit_NVK, mirror)
        # On the CPU, so that the host does not wait for the device.
        real_M = clip_batch.real_N.nonzero().flatten()
        row_M = clip_batch.row_N[real_M]
        logit_NK[row_M.to(backend.device)] = mean_NK[real_M.to(backend.device)]
        part.times_seen_N[row_M] += 1
        part.missing.extend(clip_batch.bad_clips)
        progress(done)
    return part


def batches_of_rank(
    clips: EvaluationClips, loader: Loader, backend: Backend, settings: EvaluationConfig
) -> Iterator[ClipBatch]:
    """Load this rank's clips, in batches of at most `settings.batch` views, or of one clip if it has more."""
    topology, clips_at_once = backend.topology, max(1, settings.batch // clips.protocol.views)
    return loader.batches(evaluation_rows(len(clips.source.manifest), clips_at_once, topology.rank, topology.size))


def dtype_of_logits(network: nn.Module) -> torch.dtype:
    """Return the dtype in which logits are averaged: float32, or float64 if the network is."""
    return torch.float64 if next(network.parameters()).dtype == torch.float64 else torch.float32


def logits_of_views(
    network: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    clip_batch: ClipBatch,
    views: int,
    settings: EvaluationConfig,
    device: torch.device,
) -> Tensor:
    """Compute the logits of each view of a batch, (N, V, K), from at most `settings.batch` views at once."""
    dtype = dtype_of_logits(network)
    with autocast(device, settings.amp):
        logits = [
            network(normalise(video_NTCHW)).to(dtype) for video_NTCHW in clip_batch.video_NTCHW.split(settings.batch)
        ]
    return torch.cat(logits).unflatten(0, (-1, views))


def mean_over_views(logit_NVK: Tensor, mirror: Mirror | None) -> Tensor:
    """Return the mean logits of each clip, (N, K). A mirrored view of "move left" shows "move right", and counts for it.

    `mirror`: what mirroring does to the classes, if every second view is mirrored.
    """
    if mirror is not None and mirror.pairs:
        logit_NVK = logit_NVK.clone()
        logit_NVK[:, 1::2] = logit_NVK[:, 1::2, mirror.label_K]
    return logit_NVK.mean(1)


def describe_mirrored_views(mirror: Mirror | None, classes: list[str]) -> str:
    """Say how mirrored views were counted, if that matters for a class; else return an empty string."""
    if mirror is None:
        return ""
    parts = []
    if mirror.pairs:
        one, other = (classes[label] for label in mirror.pairs[0])
        parts.append(
            f"a mirrored view counts for the mirrored class (pairs: {len(mirror.pairs)}, such as {one!r} and {other!r})"
        )
    if mirror.alone:
        parts.append(
            f"mirrored views may look like no class (classes: {len(mirror.alone)}, such as {mirror.alone[0]!r})"
        )
    return "; ".join(parts)


@torch.inference_mode()
def _gather(part: _Part, clips: EvaluationClips, backend: Backend) -> ClipLogits:
    """Sum the parts of all ranks; collective.

    Each row is not 0 on one rank only, so the sum is exact and does not depend on the world. It needs no pickling, and for
    Kinetics (20,000 clips, 400 classes) has 32 MB, about the size of a step's gradients.
    """
    manifest = clips.source.manifest
    backend.all_reduce_(part.logit_NK, "evaluation.logits")
    times_seen_N = part.times_seen_N.to(backend.device)
    backend.all_reduce_(times_seen_N, "evaluation.seen")
    # On the CPU, where the assertion launches no kernels.
    times_seen_N = times_seen_N.cpu()
    assert times_seen_N.max() <= 1, "a clip was evaluated twice"
    label_N = torch.from_numpy(manifest.labels().astype("int64")).to(backend.device)
    return ClipLogits(part.logit_NK, label_N, (times_seen_N > 0).to(backend.device))

"""The loss after a burn-in: each frame of the clip counts, and no frame of the burn-in."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipelines.stream.burn_in import StreamSampling
from tests.helpers.trainers import batches_of, trainer_of
from training.loss import clip_loss
from training.step import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

BURN_IN, FRAMES, SCORED_FROM = 3, 4, 4
STREAM = StreamSampling(burn_in=BURN_IN, distances=(1,), loss_from=2)
BOTH = replace(STREAM, score_burn_in=True)


def frame_logits(scale: float = 1.0) -> Tensor:
    """Logits (2 clips, 7 frames, 3 classes)."""
    return scale * torch.randn(2, BURN_IN + FRAMES, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_scored_frame_counts_alike(smoothing: float) -> None:
    logit_NTK, label_N = frame_logits(), torch.tensor([2, 0])
    loss, logit_NK = clip_loss(
        lambda x, per_frame: logit_NTK, torch.empty(2, 7, 3, 1, 1), label_N, None, STREAM, smoothing
    )
    parts = [
        cross_entropy(logit_NTK[clip, frame], label_N[clip], label_smoothing=smoothing)
        for clip in range(2)
        for frame in (4, 5, 6)
    ]
    torch.testing.assert_close(loss, torch.stack(parts).mean())
    torch.testing.assert_close(logit_NK, logit_NTK[:, 4:].mean(1))


def test_frames_before_are_not_scored() -> None:
    logit_NTK, label_N = frame_logits().requires_grad_(), torch.tensor([2, 0])
    loss, _ = clip_loss(lambda x, per_frame: logit_NTK, torch.empty(2, 7, 3, 1, 1), label_N, None, STREAM)
    (gradient_NTK,) = torch.autograd.grad(loss, logit_NTK)
    assert (gradient_NTK[:, :SCORED_FROM] == 0).all()
    assert (gradient_NTK[:, SCORED_FROM:] != 0).all()


def test_a_scored_burn_in_counts_as_much_as_the_clip() -> None:
    logit_NTK, label_N, burn_in_label_N = frame_logits(), torch.tensor([2, 0]), torch.tensor([1, 0])
    loss, logit_NK = clip_loss(
        lambda x, per_frame: logit_NTK, torch.empty(2, 7, 3, 1, 1), label_N, burn_in_label_N, BOTH
    )
    parts = [
        torch.stack([cross_entropy(logit_NTK[n, t], labels[n]) for n in range(2) for t in frames]).mean()
        for labels, frames in ((label_N, (4, 5, 6)), (burn_in_label_N, (1, 2)))
    ]
    torch.testing.assert_close(loss, (parts[0] + parts[1]) / 2)
    torch.testing.assert_close(logit_NK, logit_NTK[:, 4:].mean(1))


def trainer(micro_batch: int) -> Trainer:
    """A trainer of a past-only network, whose clips have FRAMES frames after the burn-in."""
    return trainer_of(
        micro_batch=micro_batch, bn_group=2, frames=FRAMES, dtype="float64", label_smoothing=0.1,
        network_options={"direction": "past"}, stream=BOTH,
    )  # fmt: skip


def test_micro_batches_take_the_same_step() -> None:
    whole, halves = trainer(4), trainer(2)
    (batch,) = batches_of(whole, 0, burn_in=BURN_IN, size=16)
    batch = replace(batch, burn_in_label_N=batch.label_N.flip(0))
    parts = [
        replace(batch, video_NTCHW=video_NTCHW, label_N=label_N, burn_in_label_N=burn_in_label_N)
        for video_NTCHW, label_N, burn_in_label_N in zip(
            batch.video_NTCHW.split(2), batch.label_N.split(2), batch.label_N.flip(0).split(2), strict=True
        )
    ]
    before = [parameter.detach().clone() for parameter in whole.network.parameters()]
    totals = whole.step(0, [batch])
    torch.testing.assert_close(halves.step(0, parts), totals)
    assert totals[2] == 4
    ours = torch.cat([parameter.flatten() for parameter in halves.network.parameters()])
    torch.testing.assert_close(
        ours, torch.cat([parameter.flatten() for parameter in whole.network.parameters()]), rtol=0, atol=1e-12
    )
    assert not torch.cat([parameter.flatten() for parameter in before]).equal(ours)

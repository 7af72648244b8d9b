"""The loss of a micro-batch: of each clip's mean logits or, after a burn-in, of each frame's logits."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cross_entropy

from pipelines.stream.burn_in import StreamSampling


def clip_loss(
    network: Callable[..., Tensor],
    video_NTCHW: Tensor,
    label_N: Tensor,
    burn_in_label_N: Tensor | None = None,
    stream: StreamSampling | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run the network, and return the mean cross-entropy and each clip's logits (N, K).

    Without `stream` the loss takes the mean of the logits over all frames, as TSN and TSM are trained. With it every scored frame
    counts alike, and the clip's logits are their mean. If the burn-in is scored too, it counts as much as the clip.
    """
    if stream is None:
        logit_NK = network(video_NTCHW)
        return cross_entropy(logit_NK, label_N, label_smoothing=label_smoothing), logit_NK
    logit_NTK = network(video_NTCHW, per_frame=True)
    scored_NTK = logit_NTK[:, stream.scored]
    loss = _frame_loss(scored_NTK, label_N, label_smoothing)
    if stream.scored_burn_in is not None:
        assert burn_in_label_N is not None
        before = _frame_loss(logit_NTK[:, stream.scored_burn_in], burn_in_label_N, label_smoothing)
        loss = (loss + before) / 2
    return loss, scored_NTK.mean(1)


def _frame_loss(logit_NTK: Tensor, label_N: Tensor, label_smoothing: float) -> Tensor:
    label_B = label_N.repeat_interleave(logit_NTK.shape[1])
    return cross_entropy(logit_NTK.flatten(0, 1), label_B, label_smoothing=label_smoothing)

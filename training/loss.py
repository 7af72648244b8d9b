"""The loss of a micro-batch: of each clip's mean logits or, after a burn-in, of each frame's logits."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cross_entropy


def clip_loss(
    network: Callable[..., Tensor],
    video_NTCHW: Tensor,
    label_N: Tensor,
    scored_from: int | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run the network, and return the mean cross-entropy and each clip's logits (N, K).

    `scored_from`: the first frame whose logits the loss takes (pipelines/stream/burn_in.py); every frame from there on counts
    alike, and the clip's logits are their mean. None: the loss takes the mean over all frames, as TSN and TSM are trained.
    """
    if scored_from is None:
        logit_NK = network(video_NTCHW)
        return cross_entropy(logit_NK, label_N, label_smoothing=label_smoothing), logit_NK
    logit_NTK = network(video_NTCHW, per_frame=True)[:, scored_from:]
    label_B = label_N.repeat_interleave(logit_NTK.shape[1])
    return cross_entropy(logit_NTK.flatten(0, 1), label_B, label_smoothing=label_smoothing), logit_NTK.mean(1)

"""Non-local blocks (Wang et al., arXiv:1711.07971) at the places in a ResNet-50 that the TSM authors chose."""

from torch import Tensor, nn

PLACES = (("layer2", 0), ("layer2", 2), ("layer3", 0), ("layer3", 2), ("layer3", 4))


class NonLocalBlock(nn.Module):
    """Attention of each position of a clip to all (2 x 2 sub-sampled) positions of all its frames; starts as the identity.

    Embedded Gaussian form: `x + BN(W(softmax(theta(x)^T phi(x)) g(x)))` with half the channels inside. Input and
    output: (N * num_frames, C, H, W).
    """

    def __init__(self, channels: int, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        inner = channels // 2
        subsample = _PoolFrames()
        self.theta = nn.Conv3d(channels, inner, 1)
        self.phi = nn.Sequential(nn.Conv3d(channels, inner, 1), subsample)
        self.g = nn.Sequential(nn.Conv3d(channels, inner, 1), subsample)
        self.W = nn.Sequential(nn.Conv3d(inner, channels, 1), nn.BatchNorm3d(channels))
        nn.init.zeros_(self.W[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.W[1].bias)  # type: ignore[arg-type]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_NCTHW = x_BCHW.unflatten(0, (-1, self.num_frames)).transpose(1, 2)
        query_NCL, key_NCM, value_NCM = (branch(x_NCTHW).flatten(2) for branch in (self.theta, self.phi, self.g))
        weight_NLM = (query_NCL.transpose(1, 2) @ key_NCM).softmax(-1)
        mixed_NCL = value_NCM @ weight_NLM.transpose(1, 2)
        out_NCTHW = x_NCTHW + self.W(mixed_NCL.unflatten(2, x_NCTHW.shape[2:]))
        return out_NCTHW.transpose(1, 2).flatten(0, 1)


class _PoolFrames(nn.Module):
    """Maximum over 2 x 2 positions of each frame: (N, C, T, H, W) -> (N, C, T, H // 2, W // 2).

    Values and gradients equal those of MaxPool3d((1, 2, 2)), whose backward pass on GPUs is not deterministic; max_pool2d's is.
    """

    def forward(self, x_NCTHW: Tensor) -> Tensor:
        pooled_BCHW = nn.functional.max_pool2d(x_NCTHW.transpose(1, 2).flatten(0, 1), 2)
        return pooled_BCHW.unflatten(0, (x_NCTHW.shape[0], -1)).transpose(1, 2)


def add_non_local_blocks(resnet: nn.Module, num_frames: int) -> None:
    """Add a non-local block after each of the residual blocks in `PLACES`, in place."""
    for stage_name, index in PLACES:
        stage: nn.Sequential = getattr(resnet, stage_name)
        block = stage[index]
        channels: int = block.bn3.num_features  # type: ignore[union-attr, assignment]
        block.register_module("non_local", NonLocalBlock(channels, num_frames))
        block.register_forward_hook(_apply_non_local)


def _apply_non_local(block: nn.Module, args: tuple[Tensor], out_BCHW: Tensor) -> Tensor:
    non_local: NonLocalBlock = block.non_local  # type: ignore[assignment]
    refined: Tensor = non_local(out_BCHW)
    return refined

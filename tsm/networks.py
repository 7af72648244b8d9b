"""TSM and TSN on torchvision's residual networks."""

from dataclasses import dataclass
from typing import Any, Literal

import torchvision
from torch import Tensor, nn

from .dropout import ClipDropout
from .non_local import add_non_local_blocks
from .shift import Direction, check_fold_div, temporal_shift

BACKBONES = {"resnet18": torchvision.models.resnet18, "resnet50": torchvision.models.resnet50}
ShiftPlace = Literal["residual", "block", "none"]


def build_network(
    backbone: str,
    num_classes: int,
    num_frames: int = 8,
    shift: ShiftPlace = "residual",
    direction: Direction = "both",
    fold_div: int = 8,
    temporal_pool: bool = False,
    non_local: bool = False,
    dropout: float = 0.5,
) -> "TemporalNetwork":
    """A 2D backbone over frames, with temporal shift (`shift='none'` is TSN), from random weights.

    `shift='residual'` shifts in front of each block's first convolution and leaves the identity path alone; `'block'` shifts
    in front of the whole block (TSM, section 3.2). `temporal_pool` halves the frames in front of layer2; `non_local` adds
    five non-local blocks to a ResNet-50.

    Raises ValueError that names the argument for anything that cannot be built.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
    if shift not in ("residual", "block", "none"):
        raise ValueError(f"shift must be 'residual', 'block' or 'none', got {shift!r}")
    if num_classes < 1 or num_frames < 1:
        raise ValueError(f"num_classes and num_frames must be 1 or more, got {num_classes} and {num_frames}")
    if non_local and backbone != "resnet50":
        raise ValueError(f"non_local has published places in resnet50 alone, got backbone={backbone!r}")
    check_fold_div(fold_div, direction)
    resnet = BACKBONES[backbone](weights=None)
    if shift != "none":
        for name, stage in _stages(resnet):
            frames = _frames_in(name, num_frames, temporal_pool)
            for block in stage:
                place = block.get_submodule("conv1") if shift == "residual" else block
                place.register_forward_pre_hook(ShiftInput(frames, fold_div, direction))
    if non_local:
        add_non_local_blocks(resnet, _frames_in("layer2", num_frames, temporal_pool))
    if temporal_pool:
        resnet.layer2.register_forward_pre_hook(PoolInput(num_frames))
    return TemporalNetwork(resnet, num_classes, num_frames, dropout)


class TemporalNetwork(nn.Module):
    """Frames through a 2D backbone, a linear classifier for each frame, and the mean of the logits over time.

    `network(x_NTCHW)` -> logits (N, num_classes). Parameters keep torchvision's names behind `backbone.`.
    """

    def __init__(self, resnet: nn.Module, num_classes: int, num_frames: int, dropout: float) -> None:
        super().__init__()
        features: int = resnet.fc.in_features  # type: ignore[union-attr, assignment]
        resnet.fc = nn.Identity()
        self.num_frames = num_frames
        self.backbone = resnet
        self.dropout = ClipDropout(dropout)
        self.classifier = nn.Linear(features, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_NTCHW: Tensor) -> Tensor:
        if x_NTCHW.dim() != 5 or x_NTCHW.shape[1] != self.num_frames or x_NTCHW.shape[2] != 3:
            raise ValueError(f"the network takes (N, {self.num_frames}, 3, H, W), got {tuple(x_NTCHW.shape)}")
        feature_BC = self.backbone(x_NTCHW.flatten(0, 1))  # B = N * T, with T halved where the network pools over time
        feature_NTC = feature_BC.unflatten(0, (len(x_NTCHW), -1))
        logit_NTK = self.classifier(self.dropout(feature_NTC))
        return logit_NTK.mean(1)


@dataclass(frozen=True)
class ShiftInput:
    """A forward pre-hook that shifts a module's input: a hook, because the module's parameters then keep their names."""

    num_frames: int
    fold_div: int
    direction: Direction

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        x_NTCHW = args[0].unflatten(0, (-1, self.num_frames))
        return (temporal_shift(x_NTCHW, self.fold_div, self.direction).flatten(0, 1),)


@dataclass(frozen=True)
class PoolInput:
    """A forward pre-hook that halves the frames by a maximum over time (kernel 3, stride 2, padding 1)."""

    num_frames: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        x_NCTHW = args[0].unflatten(0, (-1, self.num_frames)).transpose(1, 2)
        pooled_NCTHW = nn.functional.max_pool3d(x_NCTHW, (3, 1, 1), (2, 1, 1), (1, 0, 0))
        return (pooled_NCTHW.transpose(1, 2).flatten(0, 1),)


def _stages(resnet: nn.Module) -> list[tuple[str, nn.Sequential]]:
    return [(name, getattr(resnet, name)) for name in ("layer1", "layer2", "layer3", "layer4")]


def _frames_in(stage: str, num_frames: int, temporal_pool: bool) -> int:
    """Frames that a stage's blocks see: half of them, rounded up, from layer2 on where the network pools over time."""
    return (num_frames + 1) // 2 if temporal_pool and stage != "layer1" else num_frames

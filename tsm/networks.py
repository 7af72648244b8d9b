"""TSM and TSN on torchvision's residual networks and MobileNetV2."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .dropout import ClipDropout
from .modality import INPUT_CHANNELS, Modality, widen_first_convolution
from .non_local import NonLocalBlock, add_non_local_blocks
from .relu6 import replace_relu6
from .shift import Direction, check_fold_div, temporal_shift

ShiftPlace = Literal["residual", "block", "none"]

# torchvision's ResNets: residual blocks in each of the four stages.
RESNETS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnext50_32x4d": (3, 4, 6, 3),
    "resnext101_32x8d": (3, 4, 23, 3),
    "resnext101_64x4d": (3, 4, 23, 3),
    "wide_resnet50_2": (3, 4, 6, 3),
    "wide_resnet101_2": (3, 4, 23, 3),
}
BACKBONES = (*RESNETS, "mobilenet_v2")
# MobileNetV2's inverted residuals that expand their channels and have an identity path.
_MOBILENET_SHIFTED = (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)


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
    partial_bn: bool = False,
    zero_init_gamma: bool = False,
    modality: Modality = "rgb",
) -> "TemporalNetwork":
    """Build a 2D backbone over frames with temporal shift (`shift='none'` is TSN), with random weights.

    `shift='residual'` shifts before each block's first convolution and leaves the identity path unchanged; `'block'` shifts
    before the whole block (TSM, section 3.2); `shift_places` lists the modules. `temporal_pool` halves the frames before a
    ResNet's layer2. `non_local` adds five non-local blocks to a ResNet-50. `partial_bn`: see TemporalNetwork.
    `zero_init_gamma` initializes the weight of the last batch norm in each residual block to 0, so that the block starts as the
    identity (Goyal et al., arXiv:1706.02677, section 5.1). `modality='flow'` widens the first convolution (modality.py).

    Raises ValueError that names the argument if the network cannot be built.
    """
    places = shift_places(backbone, shift)
    if modality not in INPUT_CHANNELS:
        raise ValueError(f"modality must be 'rgb' or 'flow', got {modality!r}")
    if num_classes < 1 or num_frames < 1:
        raise ValueError(f"num_classes and num_frames must be 1 or more, got {num_classes} and {num_frames}")
    if non_local and backbone != "resnet50":
        # The authors' code also accepts a ResNet-101, but drops 17 of its blocks.
        raise ValueError(f"non_local has published places in resnet50 alone, got backbone={backbone!r}")
    if temporal_pool and backbone not in RESNETS:
        raise ValueError(f"temporal_pool has a published place in ResNets alone, got backbone={backbone!r}")
    check_fold_div(fold_div, direction)
    if zero_init_gamma and backbone not in RESNETS:
        raise ValueError(f"zero_init_gamma is for ResNets alone, got backbone={backbone!r}")
    options = {"zero_init_residual": True} if zero_init_gamma else {}
    body = torchvision.models.get_model(backbone, weights=None, **options)
    replace_relu6(body)
    if modality != "rgb":
        widen_first_convolution(body, INPUT_CHANNELS[modality])
    for name in places:
        frames = _frames_in(name, num_frames, temporal_pool)
        body.get_submodule(name).register_forward_pre_hook(ShiftInput(frames, fold_div, direction))
    if non_local:
        add_non_local_blocks(body, _frames_in("layer2", num_frames, temporal_pool))
    if temporal_pool:
        body.layer2.register_forward_pre_hook(PoolInput(num_frames))
    return TemporalNetwork(body, num_classes, num_frames, dropout, partial_bn, modality)


def shift_places(backbone: str, shift: ShiftPlace) -> list[str]:
    """Return the modules whose input is shifted, by torchvision's names.

    As in the authors' code (ops/temporal_shift.py, ops/models.py): `residual` shifts every second block of each stage if layer3
    has 23 blocks or more, `block` shifts all blocks. MobileNetV2 supports only `residual`.

    Raises ValueError for an unknown backbone or place.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
    if shift not in ("residual", "block", "none"):
        raise ValueError(f"shift must be 'residual', 'block' or 'none', got {shift!r}")
    if shift == "none":
        return []
    if backbone == "mobilenet_v2":
        if shift == "block":
            raise ValueError("shift='block' has no published place in mobilenet_v2, only 'residual' has")
        return [f"features.{index}.conv.0.0" for index in _MOBILENET_SHIFTED]
    stages = RESNETS[backbone]
    every = 2 if shift == "residual" and stages[2] >= 23 else 1
    blocks = [f"layer{stage}.{index}" for stage, count in enumerate(stages, 1) for index in range(0, count, every)]
    return [f"{block}.conv1" for block in blocks] if shift == "residual" else blocks


class TemporalNetwork(nn.Module):
    """A 2D backbone and a linear classifier for each frame, with the mean of the logits over time.

    `network(x_NTCHW)` -> logits (N, num_classes), for clips of `num_frames` frames with `in_channels` channels.
    `network(x_NTCHW, per_frame=True)` -> logits of each frame, (N, T, num_classes), also for clips of another length if no frame
    needs a later one (`is_past_only`).

    Parameters keep torchvision's names, prefixed with `backbone.`. The classifier computes in its parameters' dtype also under
    autocast: its cost is negligible next to the backbone's, logits in bfloat16 (8 bits) would tie, and its gradient is the
    first to overflow in float16.

    With `partial_bn`, for fine-tuning from few clips (TSN, arXiv:1608.00859, section 3.3), all batch norms except the first
    are frozen also in training: they normalise by their running statistics, and these, weight and bias do not change. (The
    authors' code freezes only two-dimensional ones, so the statistics of non-local blocks still change.)
    """

    def __init__(
        self,
        body: nn.Module,
        num_classes: int,
        num_frames: int,
        dropout: float,
        partial_bn: bool = False,
        modality: Modality = "rgb",
    ) -> None:
        super().__init__()
        head = "fc" if hasattr(body, "fc") else "classifier"
        *_, linear = (module for module in body.get_submodule(head).modules() if isinstance(module, nn.Linear))
        setattr(body, head, nn.Identity())
        self.num_frames = num_frames
        self.modality = modality
        self.in_channels = INPUT_CHANNELS[modality]
        self.partial_bn = partial_bn
        self.backbone = body
        hooks = [hook for module in body.modules() for hook in module._forward_pre_hooks.values()]
        self._shifts = [hook for hook in hooks if isinstance(hook, ShiftInput)]
        self.is_past_only = (
            all(shift.direction == "past" for shift in self._shifts)
            and not any(isinstance(hook, PoolInput) for hook in hooks)
            and not any(isinstance(module, NonLocalBlock) for module in body.modules())
        )
        """No frame's logits depend on a later frame."""
        self.dropout = ClipDropout(dropout)
        self.classifier = nn.Linear(linear.in_features, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)
        self.train()

    def forward(self, x_NTCHW: Tensor, per_frame: bool = False) -> Tensor:
        any_length = per_frame and self.is_past_only
        right_length = any_length or x_NTCHW.shape[1:2] == (self.num_frames,)
        if x_NTCHW.dim() != 5 or x_NTCHW.shape[2] != self.in_channels or not right_length:
            frames = "T" if any_length else self.num_frames
            raise ValueError(f"the network takes (N, {frames}, {self.in_channels}, H, W), got {tuple(x_NTCHW.shape)}")
        if self.is_past_only and any(shift.num_frames != x_NTCHW.shape[1] for shift in self._shifts):
            for shift in self._shifts:
                shift.num_frames = x_NTCHW.shape[1]
        # B = N * T, with T halved by temporal pooling.
        feature_BC = self.backbone(x_NTCHW.flatten(0, 1))
        # Not len(), which would make the number of clips a constant in torch.export.
        feature_NTC = feature_BC.unflatten(0, (x_NTCHW.shape[0], -1))
        with without_autocast(feature_NTC.device.type):
            logit_NTK = self.classifier(self.dropout(feature_NTC.to(self.classifier.weight.dtype)))
            return logit_NTK if per_frame else logit_NTK.mean(1)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; `partial_bn` keeps batch norms frozen, also ones converted since the last call."""
        super().train(mode)
        if self.partial_bn:
            # The base class also matches batch norms over groups of clips.
            norms = [module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
            for norm in norms[1:]:
                norm.eval()
                norm.requires_grad_(False)
        return self


@dataclass
class ShiftInput:
    """A forward pre-hook that shifts a module's input; unlike a wrapper module, it keeps the names of parameters."""

    num_frames: int
    """Frames of each clip; in past-only networks the forward pass sets it."""
    fold_div: int
    direction: Direction

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        x_NTCHW = args[0].unflatten(0, (-1, self.num_frames))
        return (temporal_shift(x_NTCHW, self.fold_div, self.direction).flatten(0, 1),)


@dataclass(frozen=True)
class PoolInput:
    """A forward pre-hook that halves the frames by max pooling over time (kernel 3, stride 2, padding 1)."""

    num_frames: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        x_NTCHW = args[0].unflatten(0, (-1, self.num_frames))
        if torch.compiler.is_exporting():
            return (_exported_maximum(x_NTCHW).flatten(0, 1),)
        pooled_NTCHW: Tensor = _TemporalMaximum.apply(x_NTCHW)  # type: ignore[no-untyped-call]
        return (pooled_NTCHW.flatten(0, 1),)


def _exported_maximum(x_NTCHW: Tensor) -> Tensor:
    """Compute the values of _TemporalMaximum by slices and few operators, for torch.export: runtimes have no `out=`."""
    even_NTCHW, odd_NTCHW = x_NTCHW[:, ::2], x_NTCHW[:, 1::2]
    # A frame outside the clip counts as the window's own frame 2j.
    earlier_NTCHW = torch.cat((even_NTCHW[:, :1], odd_NTCHW[:, : even_NTCHW.shape[1] - 1]), 1)
    later_NTCHW = torch.cat((odd_NTCHW, even_NTCHW[:, odd_NTCHW.shape[1] :]), 1)
    return torch.maximum(torch.maximum(earlier_NTCHW, even_NTCHW), later_NTCHW)


class _TemporalMaximum(torch.autograd.Function):
    """Maximum over frames 2j - 1, 2j and 2j + 1 for each j: (N, T, C, H, W) -> (N, (T + 1) // 2, C, H, W).

    Values and gradients equal those of `max_pool3d(x_NCTHW, (3, 1, 1), (2, 1, 1), (1, 0, 0))`, whose backward pass on GPUs is not
    deterministic. Zeros often tie after a ReLU: the whole gradient goes to the earliest frame of a tie, as in max_pool3d. (The
    backward of torch.maximum would halve it.) This holds for finite gradients: an infinite one makes the window's others NaN.
    """

    @staticmethod
    def forward(ctx: Any, x_NTCHW: Tensor) -> Tensor:  # type: ignore[override]
        # Frame 2j + 1 of window j is also frame 2j - 1 of the next window.
        later_NTCHW = x_NTCHW[:, 1::2]
        out_NTCHW = x_NTCHW[:, ::2].clone()
        after_first_NTCHW, with_later_NTCHW = out_NTCHW[:, 1:], out_NTCHW[:, : later_NTCHW.shape[1]]
        earlier_NTCHW = later_NTCHW[:, : after_first_NTCHW.shape[1]]
        earlier_wins_NTCHW = earlier_NTCHW >= after_first_NTCHW
        torch.maximum(earlier_NTCHW, after_first_NTCHW, out=after_first_NTCHW)
        later_wins_NTCHW = later_NTCHW > with_later_NTCHW
        torch.maximum(later_NTCHW, with_later_NTCHW, out=with_later_NTCHW)
        ctx.save_for_backward(earlier_wins_NTCHW, later_wins_NTCHW)
        ctx.shape, ctx.strides = x_NTCHW.shape, x_NTCHW.stride()
        return out_NTCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_NTCHW: Tensor) -> Tensor:  # type: ignore[override]
        earlier_wins_NTCHW, later_wins_NTCHW = ctx.saved_tensors
        grad_NTCHW = grad_out_NTCHW.new_empty_strided(ctx.shape, ctx.strides)
        even_NTCHW, odd_NTCHW = grad_NTCHW[:, ::2], grad_NTCHW[:, 1::2]
        windows = odd_NTCHW.shape[1]
        # Multiply by the mask and subtract from the rest: torch.where is 3 to 10 times slower on CPUs.
        torch.mul(grad_out_NTCHW[:, :windows], later_wins_NTCHW, out=odd_NTCHW)
        even_NTCHW.copy_(grad_out_NTCHW)
        even_NTCHW[:, :windows].sub_(odd_NTCHW)
        to_earlier_NTCHW = even_NTCHW[:, 1:] * earlier_wins_NTCHW
        even_NTCHW[:, 1:].sub_(to_earlier_NTCHW)
        odd_NTCHW[:, : to_earlier_NTCHW.shape[1]].add_(to_earlier_NTCHW)
        return grad_NTCHW


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context that disables autocast; a null context if it is off, or on meta tensors, which have no autocast."""
    on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def _frames_in(place: str, num_frames: int, temporal_pool: bool) -> int:
    """Return the frames that a module sees: half of them, rounded up, from layer2 on with temporal pooling."""
    return (num_frames + 1) // 2 if temporal_pool and not place.startswith("layer1.") else num_frames

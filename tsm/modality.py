"""Modalities of a network's input: RGB frames, or optical flow, for which the first convolution has more input channels.

Source: `_construct_flow_model` in ops/models.py of mit-han-lab/temporal-shift-module.
"""

from typing import Literal

from torch import Tensor, nn

Modality = Literal["rgb", "flow"]

INPUT_CHANNELS: dict[str, int] = {"rgb": 3, "flow": 10}
"""Channels of each of a clip's T frames: red, green and blue, or x and y of 5 consecutive flow fields (x1 y1 ... x5 y5)."""


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return the name of the first convolution, the one that sees the input, and the module."""
    return next((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))


def widen_first_convolution(body: nn.Module, channels: int) -> None:
    """Replace the first convolution by one for `channels` input channels, with random weights as torchvision's (He, fan-out)."""
    name, narrow = first_convolution(body)
    wide = nn.Conv2d(
        channels,
        narrow.out_channels,
        narrow.kernel_size,  # type: ignore[arg-type]
        narrow.stride,  # type: ignore[arg-type]
        narrow.padding,  # type: ignore[arg-type]
        bias=narrow.bias is not None,
    )
    nn.init.kaiming_normal_(wide.weight, mode="fan_out", nonlinearity="relu")
    body.set_submodule(name, wide)


def flow_weight(rgb_OIHW: Tensor) -> Tensor:
    """Return the first convolution's weight of a flow network from an image network's: its mean over RGB, for each channel."""
    return rgb_OIHW.mean(1, keepdim=True).repeat(1, INPUT_CHANNELS["flow"], 1, 1)

"""Networks for optical flow: their first convolution, size and cost; and torchvision's other ResNets against its own figures."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tsm.flops import clip_multiply_adds
from tsm.modality import first_convolution, flow_weight
from tsm.networks import RESNETS, TemporalNetwork, build_network
from tsm.streaming import streaming_network

pytestmark = pytest.mark.usefixtures("one_thread")


def empty(backbone: str = "resnet18", modality: str = "flow", **options: Any) -> TemporalNetwork:
    """A network on the meta device."""
    with torch.device("meta"):
        return build_network(backbone, **{"num_classes": 400} | options, modality=modality)  # type: ignore[arg-type]


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- Flow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "count"),
    [
        # An RGB network's, and 7 channels more of 64 filters of 7 x 7: 24,327,632 + 21,952.
        ("resnet50", 24_349_584),
        # 2,736,272, and 7 channels more of 32 filters of 3 x 3.
        ("mobilenet_v2", 2_738_288),
    ],
)
def test_parameters_of_a_flow_network(backbone: str, count: int) -> None:
    assert parameters(empty(backbone)) == count


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_only_the_first_convolutions_weight_has_another_shape(backbone: str) -> None:
    flow, rgb = empty(backbone).state_dict(), empty(backbone, "rgb").state_dict()
    assert list(flow) == list(rgb)
    (name,) = [name for name in rgb if rgb[name].shape != flow[name].shape]
    assert name == ("backbone.conv1.weight" if backbone == "resnet18" else "backbone.features.0.0.weight")
    assert (rgb[name].shape[1], flow[name].shape[1]) == (3, 10)
    assert rgb[name].shape[2:] == flow[name].shape[2:]


def test_cost_of_a_flow_network() -> None:
    """The first convolution has 112 x 112 places, 64 filters of 7 x 7, and 7 input channels more."""

    def cost(modality: str) -> int:
        return clip_multiply_adds(lambda: build_network("resnet50", 400, modality=modality), 224)  # type: ignore[arg-type]

    assert cost("flow") - cost("rgb") == 8 * 112**2 * 64 * 7**2 * 7


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_random_weights_are_as_torchvisions(backbone: str) -> None:
    """He et al.'s rule with fan-out, whose deviation does not depend on the input channels, and no equal channels."""
    torch.manual_seed(0)
    network = build_network(backbone, 3, modality="flow")
    weight = first_convolution(network.backbone)[1].weight
    fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert not torch.equal(weight[:, 0], weight[:, 1])


def test_random_weights_of_an_rgb_network_stay() -> None:
    """Its random numbers are drawn in torchvision's order, as before there was flow."""
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(weights=None).conv1.weight
    torch.manual_seed(3)
    assert torch.equal(build_network("resnet18", 3).get_parameter("backbone.conv1.weight"), theirs)


def test_image_weights_become_flow_weights() -> None:
    rgb_OIHW = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    weight = flow_weight(rgb_OIHW)
    assert weight.shape == (4, 10, 2, 2)
    for channel in range(10):
        mean_OHW = (rgb_OIHW[:, 0] + rgb_OIHW[:, 1] + rgb_OIHW[:, 2]) / 3
        torch.testing.assert_close(weight[:, channel], mean_OHW, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("modality", "channels"), [("flow", 3), ("flow", 2), ("rgb", 10)])
def test_clips_of_the_other_modality_are_refused(modality: str, channels: int) -> None:
    network = empty(modality=modality, num_frames=4)
    with pytest.raises(
        ValueError, match=rf"takes \(N, 4, {network.in_channels}, H, W\), got \(1, 4, {channels}, 8, 8\)"
    ):
        network(torch.empty(1, 4, channels, 8, 8, device="meta"))


@torch.no_grad()
def test_a_past_only_flow_network_streams() -> None:
    torch.manual_seed(0)
    network = build_network("resnet18", 3, 4, direction="past", modality="flow").double().eval()
    nn.init.normal_(network.classifier.weight)
    video_NTCHW = torch.randn(2, 4, 10, 16, 16, dtype=torch.float64)
    streaming = streaming_network(network)
    caches, logits = streaming.initial_caches(2, (16, 16)), list[Tensor]()
    for frame_NCHW in video_NTCHW.unbind(1):
        logit_NK, caches = streaming.stream(frame_NCHW, caches)
        logits.append(logit_NK)
    torch.testing.assert_close(torch.stack(logits, 1), network(video_NTCHW, per_frame=True), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"\(N, 10, H, W\), got \(2, 3, 16, 16\)"):
        streaming.stream(video_NTCHW[:, 0, :3], caches)


# --- torchvision's ResNets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", RESNETS)
def test_size_and_cost_are_those_that_torchvision_publishes(backbone: str) -> None:
    """Per frame, with ImageNet's 1,000 classes: parameters to the last one, multiply-adds to two digits."""
    published = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.meta
    assert parameters(empty(backbone, "rgb", num_classes=1000)) == published["num_params"]
    cost = clip_multiply_adds(lambda: build_network(backbone, 1000, num_frames=1), 224)
    assert cost / 1e9 == pytest.approx(published["_ops"], abs=0.006)


@pytest.mark.parametrize("backbone", RESNETS)
def test_the_shift_stands_before_every_block_or_every_second(backbone: str) -> None:
    """Before a block's first convolution; every second block of each stage where layer3 has 23 or more."""
    body = empty(backbone).backbone
    every = 2 if len(body.layer3) >= 23 else 1  # type: ignore[arg-type]
    shifted = [name for name, module in body.named_modules() if module._forward_pre_hooks]
    expected = [
        f"layer{stage}.{index}.conv1"
        for stage in (1, 2, 3, 4)
        for index in range(0, len(getattr(body, f"layer{stage}")), every)
    ]
    assert shifted == expected

"""Logits of each frame of a clip of any length, from networks in which no frame needs a later one."""

from typing import Any

import pytest
import torch

from tsm.networks import TemporalNetwork, build_network

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = 3


def network_of(backbone: str = "resnet18", **options: Any) -> TemporalNetwork:
    torch.manual_seed(0)
    return build_network(backbone, 5, FRAMES, **{"direction": "past"} | options).double().eval()


def clips(frames: int) -> torch.Tensor:
    return torch.randn(2, frames, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(frames))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"backbone": "mobilenet_v2"}, {"shift": "block"}, {"shift": "none"}])
def test_a_frame_depends_on_no_later_one(options: dict[str, Any]) -> None:
    network, x_NTCHW = network_of(**options), clips(7)
    logit_NTK = network(x_NTCHW, per_frame=True)
    assert logit_NTK.shape == (2, 7, 5)
    torch.testing.assert_close(logit_NTK[:, :4], network(x_NTCHW[:, :4], per_frame=True), rtol=0, atol=1e-12)


@torch.no_grad()
def test_clips_of_the_networks_length_are_as_before() -> None:
    network, x_NTCHW = network_of(), clips(FRAMES)
    before_NK = network(x_NTCHW)
    torch.testing.assert_close(network(x_NTCHW, per_frame=True).mean(1), before_NK)
    network(clips(7), per_frame=True)
    assert network(x_NTCHW).equal(before_NK)


@torch.no_grad()
def test_an_earlier_frame_matters_as_far_back_as_there_are_shifts() -> None:
    """ResNet-18 has 8 shifts: 8 frames of another clip hide the clip's start from every frame."""
    network, x_NTCHW = network_of(), clips(10)
    changed_NTCHW = x_NTCHW.clone()
    changed_NTCHW[:, 0] += 1
    difference_T = (network(x_NTCHW, per_frame=True) - network(changed_NTCHW, per_frame=True)).abs().amax((0, 2))
    assert (difference_T[:9] > 0).all()
    assert difference_T[9] == 0


@pytest.mark.parametrize(
    "options", [{"direction": "both"}, {"temporal_pool": True}, {"backbone": "resnet50", "non_local": True}]
)
def test_other_networks_take_only_their_length(options: dict[str, Any]) -> None:
    network = network_of(**options)
    assert not network.is_past_only
    with pytest.raises(ValueError, match=r"takes \(N, 3, 3, H, W\), got \(2, 4, 3, 32, 32\)"):
        network(clips(4), per_frame=True)


def test_a_mean_over_another_length_is_refused() -> None:
    assert network_of().is_past_only
    with pytest.raises(ValueError, match=r"takes \(N, 3, 3, H, W\)"):
        network_of()(clips(4))

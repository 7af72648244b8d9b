"""The clip form under torch.export: any number of clips, and no operator that a runtime lacks or runs slowly."""

from collections import Counter
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from tests.helpers.official_reference import randomise
from tests.helpers.worlds import CHECKOUT
from tsm.networks import build_network
from tsm.shift import OFFSETS, Direction, shift_by_cat, shift_by_slices, temporal_shift

pytestmark = pytest.mark.usefixtures("one_thread")

# The models of conf/model that differ in more than the number of blocks.
CASES = [
    pytest.param("tsm_resnet18", {}, id="resnet18"),
    pytest.param("tsm_resnet18", {"temporal_pool": True, "num_frames": 3}, id="temporal_pool"),
    pytest.param("tsm_mobilenet_v2", {}, id="mobilenet_v2"),
    pytest.param("tsm_resnet50_nonlocal", {}, id="resnet50_nonlocal", marks=pytest.mark.slow),
    pytest.param("tsm_resnet101", {}, id="resnet101", marks=pytest.mark.slow),
]
SHIFTS = {"tsm_resnet18": 8, "tsm_mobilenet_v2": 10, "tsm_resnet50_nonlocal": 16, "tsm_resnet101": 18}


@torch.no_grad()
@pytest.mark.parametrize(("model", "changes"), CASES)
def test_models_export_with_any_number_of_clips(model: str, changes: dict[str, Any]) -> None:
    options: Any = OmegaConf.to_container(OmegaConf.load(CHECKOUT / f"conf/model/{model}.yaml"))
    del options["defaults"]
    torch.manual_seed(0)
    network = build_network(num_classes=5, **{"num_frames": 4} | options | changes).double().eval()
    randomise(network)
    x_NTCHW = torch.randn(5, network.num_frames, 3, 32, 32, dtype=torch.float64)
    program = torch.export.export(network, (x_NTCHW[:2],), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    counts = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert not any(word in name for name in counts for word in ("copy", "scatter", "select", "empty", "fill", "tsm"))
    # One concatenation per shift, and two in the temporal pooling.
    assert counts["aten.cat.default"] == SHIFTS[model] + 2 * ("temporal_pool" in changes)
    exported = program.module()
    for batch in (1, 5):
        expected_NK = network(x_NTCHW[:batch])
        torch.testing.assert_close(exported(x_NTCHW[:batch]), expected_NK, rtol=0, atol=1e-10 * expected_NK.abs().max())


@pytest.mark.parametrize("channels", [7, 8, 6])
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("direction", ["both", "past"])
def test_the_exported_shift_has_the_same_bits(direction: Direction, frames: int, channels: int) -> None:
    """With 6 channels in two folds of 3, none stays."""
    x_NTCHW = torch.randn(2, frames, channels, 3, 2)
    x_NTCHW[0, 0, 0, 0] = torch.tensor([torch.nan, -0.0])
    shifted = shift_by_cat(x_NTCHW, 3, OFFSETS[direction])
    assert shifted.view(torch.int32).equal(shift_by_slices(x_NTCHW, 3, OFFSETS[direction]).view(torch.int32))


class Traced(nn.Module):
    def forward(self, x_NTC: torch.Tensor) -> torch.Tensor:
        return temporal_shift(x_NTC)


@pytest.mark.parametrize("strict", [True, False])
def test_a_shift_is_a_few_operators(strict: bool) -> None:
    program = torch.export.export(Traced(), (torch.randn(2, 3, 16),), strict=strict)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert len([name for name in names if "getitem" not in name]) <= 8, names

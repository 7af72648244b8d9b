"""Networks: sizes, placement of shifts, temporal receptive field, names, initial values, and errors."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from distributed.backends.single import SingleBackend
from distributed.batch_norm.layer import GroupBatchNorm, convert_batch_norm
from distributed.topology import Topology
from tsm.flops import clip_multiply_adds
from tsm.networks import BACKBONES, PoolInput, ShiftInput, TemporalNetwork, build_network, shift_places
from tsm.non_local import PLACES, NonLocalBlock

FRAMES, CLASSES = 4, 5


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def weights(backbone: str) -> dict[str, Tensor]:
    """Initial weights in float64, with non-local blocks for the backbone that supports them."""
    torch.manual_seed(0)
    network = build_network(backbone, CLASSES, non_local=backbone == "resnet50")
    return network.double().state_dict()


def empty(**changes: Any) -> TemporalNetwork:
    """ResNet-18 for four frames in evaluation mode, on the meta device: shapes without values, fast to build."""
    options: dict[str, Any] = {"backbone": "resnet18", "num_classes": CLASSES, "num_frames": FRAMES} | changes
    with torch.device("meta"):
        return build_network(**options).eval()


def small(**changes: Any) -> TemporalNetwork:
    """Network of `empty` with a copy of `weights`."""
    network = empty(**changes)
    names = network.state_dict().keys()
    given = {
        name: tensor.clone() for name, tensor in weights(changes.get("backbone", "resnet18")).items() if name in names
    }
    network.load_state_dict(given, assign=True)
    return network


def clips(n: int = 2, frames: int = FRAMES, side: int = 16) -> Tensor:
    return torch.randn(n, frames, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def frame_features(network: TemporalNetwork, x_NTCHW: Tensor) -> Tensor:
    """Compute feature_NTC, the backbone's features of each frame."""
    feature_BC: Tensor = network.backbone(x_NTCHW.flatten(0, 1))
    return feature_BC.unflatten(0, (len(x_NTCHW), -1))


def hooks_of(network: nn.Module, kind: type) -> list[tuple[str, Any]]:
    """List (module name, hook) of every forward pre-hook of this kind."""
    return [
        (name, hook)
        for name, module in network.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, kind)
    ]


# --- Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "non_local", "count"),
    [
        ("resnet50", False, 24_327_632),
        ("resnet50", True, 31_686_096),
        ("resnet101", False, 43_319_760),
        ("mobilenet_v2", False, 2_736_272),
    ],
)
def test_parameters_at_400_classes(backbone: str, non_local: bool, count: int) -> None:
    network = empty(backbone=backbone, num_classes=400, non_local=non_local)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(
    ("backbone", "place", "count"),
    [
        ("resnet18", "residual", 8),
        ("resnet18", "block", 8),
        ("resnet34", "residual", 16),
        ("resnet50", "residual", 16),
        ("resnet50", "block", 16),
        # Every second block of each stage: 2 + 2 + 12 + 2.
        ("resnet101", "residual", 18),
        ("resnet101", "block", 33),
        ("mobilenet_v2", "residual", 10),
        # 2 + 4 + 18 + 2.
        ("resnet152", "residual", 26),
        ("resnext50_32x4d", "residual", 16),
        ("resnext101_32x8d", "residual", 18),
        ("resnext101_64x4d", "block", 33),
        ("wide_resnet50_2", "residual", 16),
        ("wide_resnet101_2", "residual", 18),
    ],
)
def test_a_block_has_one_shift(backbone: str, place: str, count: int) -> None:
    names = [name for name, _ in hooks_of(empty(backbone=backbone, shift=place), ShiftInput)]
    assert len(names) == len(set(names)) == count
    assert names == [f"backbone.{name}" for name in shift_places(backbone, place)]  # type: ignore[arg-type]


def test_resnet101_shifts_every_second_block() -> None:
    places = shift_places("resnet101", "residual")
    assert [place for place in places if place.startswith(("layer1", "layer4"))] == [
        f"layer{stage}.{block}.conv1" for stage in (1, 4) for block in (0, 2)
    ]
    assert [int(place.split(".")[1]) for place in places if place.startswith("layer3")] == list(range(0, 23, 2))


def test_mobilenet_shifts_what_has_an_identity_path_and_expands() -> None:
    network = empty(backbone="mobilenet_v2")
    expected = [
        f"features.{index}.conv.0.0"
        for index, block in enumerate(network.get_submodule("backbone.features").children())
        if getattr(block, "use_res_connect", False) and len(block.conv) == 4  # type: ignore[arg-type]
    ]
    assert shift_places("mobilenet_v2", "residual") == expected
    assert [int(place.split(".")[1]) for place in expected] == [3, 5, 6, 8, 9, 10, 12, 13, 15, 16]


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("frames", [1, 3])
def test_every_backbone_takes_any_number_of_frames(backbone: str, frames: int) -> None:
    network = empty(backbone=backbone, num_frames=frames)
    assert network(torch.empty(2, frames, 3, 32, 32, device="meta")).shape == (2, CLASSES)


@torch.no_grad()
def test_one_frame_has_nothing_to_shift_but_zeros() -> None:
    """A single frame has no neighbours: the shifted channels are zeros in both directions."""
    network = small(num_frames=1)
    block = network.get_submodule("backbone.layer1.0.conv1")
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    network(clips(frames=1))
    assert (seen[0][:, :16] == 0).all()
    assert (seen[0][:, 16:] != 0).any()


def test_tsn_has_no_shift() -> None:
    assert hooks_of(empty(shift="none"), ShiftInput) == []


def test_logits_have_a_row_for_each_clip() -> None:
    assert small()(clips(3)).shape == (3, CLASSES)


# --- Names and weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "temporal_pool"), [*((name, False) for name in BACKBONES), ("resnet18", True), ("resnet50", True)]
)
def test_parameters_keep_torchvisions_names(backbone: str, temporal_pool: bool) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(backbone, weights=None).state_dict()
    ours = empty(backbone=backbone, temporal_pool=temporal_pool).state_dict()
    backbone_names = {f"backbone.{name}" for name in theirs if not name.startswith(("fc.", "classifier."))}
    assert set(ours) == backbone_names | {"classifier.weight", "classifier.bias"}


def test_torchvision_weights_load() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.resnet18(weights=None).state_dict()
    missing = empty().backbone.load_state_dict(theirs, strict=False, assign=True)
    assert missing.missing_keys == []
    assert set(missing.unexpected_keys) == {"fc.weight", "fc.bias"}


def test_the_classifier_starts_small_and_without_bias() -> None:
    classifier = build_network("resnet50", 400).classifier
    assert classifier.weight.std().item() == pytest.approx(0.001, rel=0.01)
    assert abs(classifier.weight.mean().item()) < 1e-5
    assert (classifier.bias == 0).all()


def test_state_dict_round_trip() -> None:
    first, second = small(), small()
    for tensor in first.state_dict().values():
        tensor.add_(torch.rand(tensor.shape)) if tensor.is_floating_point() else tensor.add_(1)
    assert not torch.equal(first(clips()), second(clips()))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(clips()), second(clips()))


def test_a_deep_copy_shifts_too_and_shares_no_weights() -> None:
    network = small(temporal_pool=True)
    twin = copy.deepcopy(network)
    assert torch.equal(network(clips()), twin(clips()))
    nn.init.normal_(twin.backbone.conv1.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(network(clips()), twin(clips()))


# --- Frames -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tsn_does_not_see_the_order_of_frames() -> None:
    network = small(shift="none")
    torch.testing.assert_close(network(clips()), network(clips().flip(1)), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("place", ["residual", "block"])
@pytest.mark.parametrize("direction", ["both", "past"])
def test_tsm_sees_the_order_of_frames(place: str, direction: str) -> None:
    network = small(shift=place, direction=direction)
    assert (network(clips()) - network(clips().flip(1))).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("backbone", "place"), [("resnet18", "residual"), ("resnet18", "block"), ("mobilenet_v2", "residual")]
)
def test_past_never_sees_the_future(backbone: str, place: str) -> None:
    network = small(backbone=backbone, shift=place, direction="past")
    later = clips()
    later[:, -1] += 1
    before, after = frame_features(network, clips()), frame_features(network, later)
    # The first features of MobileNetV2 are tiny.
    size = before.abs().max().item()
    torch.testing.assert_close(before[:, :-1], after[:, :-1], rtol=0, atol=1e-12 * size)
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-3 * size


def test_both_sees_the_future() -> None:
    later = clips()
    later[:, -1] += 1
    network = small(direction="both")
    difference_NTC = (frame_features(network, clips()) - frame_features(network, later)).abs()
    assert (difference_NTC.amax((0, 2)) > 1e-4).all()


def test_past_says_of_a_prefix_what_it_says_of_the_whole() -> None:
    whole, prefix = small(direction="past"), small(direction="past", num_frames=2)
    prefix.load_state_dict(whole.state_dict())
    feature_NTC = frame_features(whole, clips())
    torch.testing.assert_close(frame_features(prefix, clips()[:, :2]), feature_NTC[:, :2], rtol=0, atol=1e-12)


@torch.no_grad()
def test_clips_of_a_batch_do_not_mix() -> None:
    network = small()
    alone = torch.cat([network(clip[None]) for clip in clips(3)])
    torch.testing.assert_close(network(clips(3)), alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_logits_are_the_mean_over_time() -> None:
    network = small()
    nn.init.normal_(network.classifier.bias)
    feature_NTC = frame_features(network, clips())
    per_frame = [network.classifier(feature_NTC[:, t]) for t in range(FRAMES)]
    torch.testing.assert_close(network(clips()), sum(per_frame) / FRAMES, rtol=0, atol=1e-12)


def zero_branch(block: nn.Module) -> None:
    """Zero the residual branch of a block, so that only its identity path remains."""
    nn.init.zeros_(block.bn2.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(block.bn2.bias)  # type: ignore[union-attr, arg-type]


@torch.no_grad()
@pytest.mark.parametrize(("place", "alone"), [("residual", True), ("block", False)])
def test_residual_leaves_the_identity_path_alone(place: str, alone: bool) -> None:
    block = small(shift=place).get_submodule("backbone.layer1.0")
    zero_branch(block)
    x_BCHW = torch.rand(FRAMES, 64, 3, 3, dtype=torch.float64)
    assert torch.equal(block(x_BCHW), x_BCHW) == alone


@torch.no_grad()
def test_residual_shifts_what_the_first_convolution_sees() -> None:
    block = small().get_submodule("backbone.layer1.0")
    seen: list[Tensor] = []
    block.get_submodule("conv1").register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x_BCHW = torch.rand(FRAMES, 64, 3, 3, dtype=torch.float64)
    block(x_BCHW)
    assert torch.equal(seen[0][:-1, :8], x_BCHW[1:, :8])
    assert torch.equal(seen[0][1:, 8:16], x_BCHW[:-1, 8:16])
    assert torch.equal(seen[0][:, 16:], x_BCHW[:, 16:])


def test_fold_div_reaches_the_shifts() -> None:
    assert {hook.fold_div for _, hook in hooks_of(empty(fold_div=3), ShiftInput)} == {3}


# --- Temporal pool ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "pooled"), [(8, 4), (5, 3), (2, 1), (1, 1)])
def test_temporal_pool_halves_the_frames(frames: int, pooled: int) -> None:
    network = small(num_frames=frames, temporal_pool=True)
    assert frame_features(network, clips(2, frames)).shape == (2, pooled, 512)
    in_layer1 = {hook.num_frames for name, hook in hooks_of(network, ShiftInput) if ".layer1." in name}
    behind = {hook.num_frames for name, hook in hooks_of(network, ShiftInput) if ".layer1." not in name}
    assert (in_layer1, behind) == ({frames}, {pooled})


def test_temporal_pool_is_the_maximum_of_three_frames() -> None:
    x_TCHW = torch.randn(5, 2, 1, 1)
    (pooled,) = PoolInput(5)(nn.Identity(), (x_TCHW,))
    expected = [x_TCHW[max(0, t - 1) : t + 2].amax(0) for t in (0, 2, 4)]
    assert torch.equal(pooled, torch.stack(expected))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 2, 3, 7, 8])
def test_temporal_pool_is_max_pool3d_to_the_bit(
    frames: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Inputs have ties: most values are zeros, as after a ReLU, and many others are equal."""
    torch.manual_seed(frames)
    values_BCHW = torch.randn(3 * frames, 4, 5, 6).relu().round(decimals=0)
    ours_BCHW, theirs_BCHW = (
        values_BCHW.to(dtype).contiguous(memory_format=memory_format).requires_grad_() for _ in range(2)
    )
    x_NCTHW = theirs_BCHW.unflatten(0, (-1, frames)).transpose(1, 2)
    expected_NCTHW = nn.functional.max_pool3d(x_NCTHW, (3, 1, 1), (2, 1, 1), (1, 0, 0))
    expected_BCHW = expected_NCTHW.transpose(1, 2).flatten(0, 1)
    (pooled_BCHW,) = PoolInput(frames)(nn.Identity(), (ours_BCHW,))
    gradient_BCHW = torch.randn(pooled_BCHW.shape).to(dtype)
    pooled_BCHW.backward(gradient_BCHW)
    expected_BCHW.backward(gradient_BCHW)
    assert pooled_BCHW.equal(expected_BCHW)
    assert ours_BCHW.grad is not None and theirs_BCHW.grad is not None
    assert ours_BCHW.grad.equal(theirs_BCHW.grad)
    assert pooled_BCHW.is_contiguous(memory_format=memory_format)
    assert ours_BCHW.grad.is_contiguous(memory_format=memory_format)


def test_the_earliest_frame_of_a_tie_has_the_gradient() -> None:
    x_TCHW = torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 1.0]).view(6, 1, 1, 1).requires_grad_()
    (pooled_TCHW,) = PoolInput(6)(nn.Identity(), (x_TCHW,))
    assert pooled_TCHW.flatten().tolist() == [0.0, 2.0, 2.0]
    pooled_TCHW.backward(torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1))
    assert x_TCHW.grad is not None
    # Frames 0 and 1 tie in the first window, only frame 3 is the maximum of the second, and 3 and 4 tie in the third.
    assert x_TCHW.grad.flatten().tolist() == [1.0, 0.0, 0.0, 110.0, 0.0, 0.0]


@pytest.mark.parametrize("frame", range(5))
def test_temporal_pool_hides_no_nan(frame: int) -> None:
    x_TCHW = torch.zeros(5, 1, 1, 1)
    x_TCHW[frame] = torch.nan
    (pooled_TCHW,) = PoolInput(5)(nn.Identity(), (x_TCHW,))
    assert pooled_TCHW.isnan().any()


def test_temporal_pool_stands_in_front_of_layer2() -> None:
    names = [name for name, _ in hooks_of(empty(temporal_pool=True), PoolInput)]
    assert names == ["backbone.layer2"]


# --- Non-local blocks -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temporal_pool", [False, True])
def test_non_local_blocks_start_as_the_identity(temporal_pool: bool) -> None:
    plain = small(backbone="resnet50", temporal_pool=temporal_pool)
    with_blocks = small(backbone="resnet50", temporal_pool=temporal_pool, non_local=True)
    torch.testing.assert_close(with_blocks(clips(1, side=32)), plain(clips(1, side=32)), rtol=0, atol=1e-12)


def test_non_local_blocks_stand_where_the_authors_put_them() -> None:
    network = empty(backbone="resnet50", non_local=True)
    names = [name for name, module in network.named_modules() if isinstance(module, NonLocalBlock)]
    assert names == [f"backbone.{stage}.{index}.non_local" for stage, index in PLACES]
    assert PLACES == (("layer2", 0), ("layer2", 2), ("layer3", 0), ("layer3", 2), ("layer3", 4))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_non_local_blocks_subsample_as_max_pool3d_does(memory_format: torch.memory_format) -> None:
    """Values and gradients agree, for odd and even sides."""
    torch.manual_seed(0)
    values_NCTHW = torch.randn(2, 4, 3, 7, 6).relu().round(decimals=0)
    ours_NCTHW, theirs_NCTHW = (
        values_NCTHW.clone(memory_format=torch.preserve_format).contiguous(memory_format=memory_format).requires_grad_()
        for _ in range(2)
    )
    subsample = NonLocalBlock(8, 3).phi[1]
    pooled_NCTHW, expected_NCTHW = subsample(ours_NCTHW), nn.functional.max_pool3d(theirs_NCTHW, (1, 2, 2))
    gradient_NCTHW = torch.randn(expected_NCTHW.shape)
    pooled_NCTHW.backward(gradient_NCTHW)
    expected_NCTHW.backward(gradient_NCTHW)
    assert pooled_NCTHW.equal(expected_NCTHW)
    assert ours_NCTHW.grad is not None and theirs_NCTHW.grad is not None
    assert ours_NCTHW.grad.equal(theirs_NCTHW.grad)


@torch.no_grad()
def test_a_non_local_block_is_attention_over_all_frames() -> None:
    torch.manual_seed(0)
    block = NonLocalBlock(4, 2).double().eval()
    nn.init.ones_(block.W[1].weight)  # type: ignore[arg-type]
    x_BCHW = torch.randn(2, 4, 2, 2, dtype=torch.float64)

    def pointwise(convolution: nn.Module, x_CL: Tensor) -> Tensor:
        weight, bias = convolution.weight, convolution.bias
        return weight.flatten(1) @ x_CL + bias[:, None]  # type: ignore[operator, index, union-attr]

    # L = frame, row, column.
    x_CL = x_BCHW.permute(1, 0, 2, 3).flatten(1)
    query_CL = pointwise(block.theta, x_CL)
    # Pooling merges the 2 x 2 positions of a frame into one.
    key_CM, value_CM = (pointwise(branch[0], x_CL).unflatten(1, (2, 4)).amax(2) for branch in (block.phi, block.g))
    mixed_CL = torch.stack([value_CM @ (key_CM.T @ query).softmax(0) for query in query_CL.T], 1)
    expected_CL = x_CL + pointwise(block.W[0], mixed_CL) / (1 + block.W[1].eps) ** 0.5  # type: ignore[operator]
    expected_BCHW = expected_CL.unflatten(1, (2, 2, 2)).permute(1, 0, 2, 3)
    torch.testing.assert_close(block(x_BCHW), expected_BCHW, rtol=1e-12, atol=1e-12)


# --- Partial batch norm -----------------------------------------------------------------------------------------------


def norms_of(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def converted(network: TemporalNetwork) -> TemporalNetwork:
    """Convert the network's batch norms to groups of clips, as training does."""
    topology = Topology(launcher="none", rank=0, size=1, local_rank=0, local_size=1, node=0, host="here")
    backend = SingleBackend(topology, torch.device("cpu"))
    convert_batch_norm(network, backend, ghosts=2, rank_groups=[], accumulation=1)
    return network


@torch.no_grad()
def adapt_statistics(network: TemporalNetwork) -> None:
    """Give norms the statistics of a batch, because random frozen statistics could make a gradient vanish."""
    for norm in norms_of(network):
        norm.train()
        norm.momentum = 1.0
    network(torch.randn(2, FRAMES, 3, 32, 32))
    for norm in norms_of(network):
        norm.momentum = 0.1


@pytest.mark.parametrize("convert", [False, True], ids=["torch's", "over groups"])
@pytest.mark.parametrize(("backbone", "non_local"), [("resnet18", False), ("resnet50", True), ("mobilenet_v2", False)])
def test_partial_bn_freezes_all_norms_but_the_first(backbone: str, non_local: bool, convert: bool) -> None:
    torch.manual_seed(0)
    network = build_network(backbone, CLASSES, FRAMES, non_local=non_local, partial_bn=True)
    adapt_statistics(network)
    if convert:
        converted(network)
    network.eval()
    network.train()
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(network(torch.randn(2, FRAMES, 3, 32, 32)), torch.tensor([0, 1])).backward()
    optimizer.step()
    after = network.state_dict()
    first, *others = norms_of(network)
    assert isinstance(first, GroupBatchNorm) == convert
    name_of = {module: name for name, module in network.named_modules()}
    for norm in others:
        assert norm.weight.grad is None and norm.bias.grad is None
        for kind in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(after[f"{name_of[norm]}.{kind}"], before[f"{name_of[norm]}.{kind}"])
    assert name_of[first] in ("backbone.bn1", "backbone.features.0.1")
    for kind in ("weight", "bias", "running_mean", "running_var"):
        assert not torch.equal(after[f"{name_of[first]}.{kind}"], before[f"{name_of[first]}.{kind}"])
    convolutions = [name for name, p in network.named_parameters() if p.dim() > 1 and ".non_local." not in name]
    assert not any(torch.equal(after[name], before[name]) for name in convolutions)


def test_without_partial_bn_every_norm_learns() -> None:
    network = empty()
    network.train()
    assert all(norm.training and norm.weight.requires_grad for norm in norms_of(network))


def test_evaluation_of_partial_bn_freezes_the_first_too() -> None:
    network = empty(partial_bn=True)
    assert not any(module.training for module in network.modules())
    network.train()
    assert network.training and network.dropout.training


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vgg"}, "backbone.*resnet18.*'vgg'"),
        ({"shift": "inplace"}, "shift.*'inplace'"),
        ({"backbone": "mobilenet_v2", "shift": "block"}, "shift='block'.*mobilenet_v2"),
        ({"backbone": "mobilenet_v2", "temporal_pool": True}, "temporal_pool.*mobilenet_v2"),
        ({"backbone": "mobilenet_v2", "non_local": True}, "non_local.*mobilenet_v2"),
        ({"backbone": "resnet101", "non_local": True}, "non_local.*resnet101"),
        ({"backbone": "resnext50_32x4d", "non_local": True}, "non_local.*resnext50_32x4d"),
        ({"modality": "depth"}, "modality.*'depth'"),
        ({"num_classes": 0}, "num_classes.*0"),
        ({"num_frames": 0}, "num_frames.*0"),
        ({"non_local": True}, "non_local.*resnet18"),
        ({"fold_div": 1}, "fold_div.*1"),
        ({"direction": "future"}, "direction.*'future'"),
        ({"dropout": 1.0}, r"dropout.*1\.0"),
        ({"dropout": -0.1}, r"dropout.*-0\.1"),
    ],
)
def test_what_cannot_be_built_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        empty(**changes)


@pytest.mark.parametrize("shape", [(1, 3, 3, 8, 8), (1, FRAMES, 1, 8, 8), (FRAMES, 3, 8, 8)])
def test_clips_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"\(N, {FRAMES}, 3, H, W\), got"):
        empty()(torch.zeros(shape, device="meta"))


# --- Cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "published_g", "digits"),
    [
        # TSM, arXiv:1811.08383v3, table 2: 33 G and 65 G per clip; arXiv:1910.00932 also has the first.
        ({"backbone": "resnet50", "num_frames": 8}, 33, 0),
        ({"backbone": "resnet50", "num_frames": 16}, 65, 0),
        # MobileNetV2, arXiv:1801.04381, table 4: 300 M per frame, with 1,000 classes.
        ({"backbone": "mobilenet_v2", "num_frames": 1, "num_classes": 1000}, 0.3, 1),
        # torchvision's documentation of each backbone, per frame with 1,000 classes.
        ({"backbone": "resnet18", "num_frames": 1, "num_classes": 1000}, 1.81, 2),
        ({"backbone": "resnet34", "num_frames": 1, "num_classes": 1000}, 3.66, 2),
        ({"backbone": "resnet50", "num_frames": 1, "num_classes": 1000}, 4.09, 2),
        ({"backbone": "resnet101", "num_frames": 1, "num_classes": 1000}, 7.8, 1),
    ],
)
def test_published_cost_of_a_clip(options: dict[str, Any], published_g: float, digits: int) -> None:
    cost = clip_multiply_adds(lambda: build_network(**({"num_classes": 400} | options)), 224)
    assert round(cost / 1e9, digits) == published_g


@pytest.mark.parametrize(
    ("options", "published_g"),
    [
        # mmaction2, configs/recognition/tsm/README.md; its counter includes batch norms, half a percent.
        ({"backbone": "resnet50", "num_frames": 8}, 32.88),
        ({"backbone": "resnet50", "num_frames": 16}, 65.75),
        ({"backbone": "resnet50", "num_frames": 8, "non_local": True}, 61.30),
        ({"backbone": "resnet101", "num_frames": 8}, 62.66),
    ],
)
def test_cost_of_a_clip_that_mmaction2_publishes(options: dict[str, Any], published_g: float) -> None:
    cost = clip_multiply_adds(lambda: build_network(num_classes=400, **options), 224)
    assert 0.99 * published_g < cost / 1e9 < published_g


def test_the_shift_costs_nothing_and_the_temporal_pool_saves() -> None:
    def cost(**options: Any) -> int:
        return clip_multiply_adds(lambda: build_network("resnet50", 400, **options), 224)

    assert cost() == cost(shift="none") == cost(shift="block") == cost(direction="past")
    assert cost(temporal_pool=True) < 0.7 * cost()


@pytest.mark.parametrize(("backbone", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_with_zero_gammas_every_block_starts_as_the_identity(backbone: str, last: str) -> None:
    network = build_network(backbone, 2, 2, zero_init_gamma=True)
    gammas = {name: norm.weight for name, norm in network.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    zero = {name for name, gamma in gammas.items() if not gamma.any()}
    assert zero == {name for name in gammas if name.endswith(last) and ".layer" in name}
    assert all(gammas[name].eq(1).all() for name in gammas.keys() - zero)


def test_zero_gammas_need_residual_blocks() -> None:
    with pytest.raises(ValueError, match="zero_init_gamma is for ResNets alone.*mobilenet_v2"):
        build_network("mobilenet_v2", 2, zero_init_gamma=True)

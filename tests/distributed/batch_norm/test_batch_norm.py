"""Batch norm over groups of clips agrees with torch's and with float64 references. Multi-process tests: test_worlds.py."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed.backends.base import Group
from distributed.backends.single import SingleBackend
from distributed.batch_norm.layer import GroupBatchNorm, convert_batch_norm
from distributed.batch_norm.running_statistics import average_running_statistics, recompute_running_statistics
from distributed.batch_norm.synchronized import group_statistics, message_bytes, synchronized_norm
from distributed.topology import Topology
from training.planning.summary import batch_norm_messages, describe_batch_norm
from training.recipe import Execution
from tsm.networks import build_network

ALONE = Topology("none", 0, 1, 0, 1, 0, "here")
SHAPES = {
    "columns": ((12, 5), nn.BatchNorm1d, torch.contiguous_format),
    "rows": ((6, 5, 7), nn.BatchNorm1d, torch.contiguous_format),
    "images": ((6, 5, 4, 3), nn.BatchNorm2d, torch.contiguous_format),
    "images_channels_last": ((6, 5, 4, 3), nn.BatchNorm2d, torch.channels_last),
    "clips": ((4, 5, 2, 4, 3), nn.BatchNorm3d, torch.contiguous_format),
    "clips_channels_last": ((4, 5, 2, 4, 3), nn.BatchNorm3d, torch.channels_last_3d),
}


class CountingBackend(SingleBackend):
    """Backend of a world of one that records the name and size of each all-reduce."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(ALONE, torch.device(device))
        self.sent: list[tuple[str, int]] = []

    def all_reduce_(self, x: Tensor, name: str, group: Group | None = None) -> None:
        assert x.is_contiguous()
        self.sent.append((name, x.numel() * x.element_size()))


def alone(x: Tensor, kind: str) -> None:
    """All-reduce over a group of one rank: a no-op."""


def random_norm(kind: type[Any], channels: int, **options: Any) -> nn.Module:
    norm: nn.Module = kind(channels, momentum=0.3, eps=1e-3, **options).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    return norm


def synchronized(norm: nn.Module) -> Any:
    """Copy of the norm that uses the synchronized path, in a group of one."""
    holder = nn.Sequential(copy.deepcopy(norm))
    convert_batch_norm(holder, CountingBackend(), 1, [[0]], 1)
    return holder[0]


def passed(norm: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = norm(x)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_layout_gives_what_torch_gives(shape: str, affine: bool) -> None:
    size, kind, memory_format = SHAPES[shape]
    plain = random_norm(kind, size[1], affine=affine)
    ours = synchronized(plain)
    x = (3 * torch.randn(size, dtype=torch.float64) + 2).contiguous(memory_format=memory_format)
    # Autograd may pass a gradient with another layout than the input's.
    grad = torch.randn(size, dtype=torch.float64)
    (out, grad_x), (expected, expected_grad_x) = passed(ours, x, grad), passed(plain, x, grad)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_x, expected_grad_x, rtol=1e-11, atol=1e-12)
    assert out.stride() == grad_x.stride() == x.stride()
    assert len(list(ours.parameters())) == (2 if affine else 0)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-12, atol=1e-12)


def test_a_part_of_a_tensor_is_taken_as_well() -> None:
    plain = random_norm(nn.BatchNorm2d, 3)
    x = torch.randn(4, 6, 5, 10, dtype=torch.float64)[:, ::2, :, 1:8]
    grad = torch.randn(1, 3, 5, 1, dtype=torch.float64).expand(4, 3, 5, 7)
    for mine, theirs in zip(passed(synchronized(plain), x, grad), passed(plain, x, grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_statistics_of_float32_lose_no_digits_far_from_zero(offset: float) -> None:
    """Two unequal parts are joined as two ranks would. At 1e4 standard deviations float32 inputs keep few digits."""
    x_BCHW = torch.randn(64, 8, 8, 8, generator=torch.Generator().manual_seed(0)) + offset
    messages: list[Tensor] = []
    for part_BCHW in x_BCHW.split((20, 44)):
        group_statistics(part_BCHW, lambda message, kind: messages.append(message.clone()))
    joined = messages[0] + messages[1]
    mean_C, var_C, count = group_statistics(x_BCHW[:20], lambda message, kind: message.copy_(joined))  # type: ignore[arg-type,return-value]
    exact_BCHW = x_BCHW.double()
    assert mean_C.dtype == var_C.dtype == torch.float32
    assert count == 64 * 64
    torch.testing.assert_close(mean_C.double(), exact_BCHW.mean((0, 2, 3)), rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(var_C.double(), exact_BCHW.var((0, 2, 3), correction=0), rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_half_precision_inputs_have_statistics_in_float32(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Dtypes of autocast: parameters and statistics in float32, activations and gradients in half precision."""
    norm = random_norm(nn.BatchNorm2d, 6).float()
    ours, exact = synchronized(norm), copy.deepcopy(norm).double()
    x = (torch.randn(8, 6, 9, 9) + 4).to(dtype).contiguous(memory_format=memory_format)
    grad = torch.randn(8, 6, 9, 9).to(dtype).contiguous(memory_format=memory_format)
    out, grad_x = passed(ours, x, grad)
    expected, expected_grad_x = passed(exact, x.double(), grad.double())
    assert out.dtype == grad_x.dtype == dtype
    assert out.stride() == grad_x.stride() == x.stride()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=step, atol=step)
    torch.testing.assert_close(grad_x.double(), expected_grad_x, rtol=2 * step, atol=step)
    for name in ("running_mean", "running_var"):
        assert getattr(ours, name).dtype == torch.float32
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-6)


def test_autocast_leaves_statistics_in_float32() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    plain = copy.deepcopy(network)
    convert_batch_norm(network, CountingBackend(), 1, [[0]], 1)
    x_BCHW = torch.randn(4, 3, 8, 8)
    results = []
    for each in (network, plain):
        with torch.autocast("cpu", torch.bfloat16):
            out = each(x_BCHW)
            loss = out.float().square().mean()
        loss.backward()
        results.append([out, *(parameter.grad for parameter in each.parameters()), each[1].running_var])  # type: ignore[union-attr]
    assert results[0][0].dtype == torch.bfloat16
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)
    torch.testing.assert_close(results[0][-1], results[1][-1], rtol=1e-5, atol=0)


def test_a_second_derivative_is_refused() -> None:
    x_BC = torch.randn(4, 3, requires_grad=True)
    out_BC, *_ = synchronized_norm(x_BC, None, None, 1e-5, alone)
    (grad_BC,) = torch.autograd.grad(out_BC.square().sum(), x_BC, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_BC.sum().backward()


def test_constant_channels_have_no_negative_variance() -> None:
    x_BC = (torch.rand(200, dtype=torch.float64) * 1e5).expand(63, 200).contiguous()
    _, var_C, _ = group_statistics(x_BC, alone)
    out_BC, *_ = synchronized_norm(x_BC, None, None, 1e-12, alone)
    assert (var_C >= 0).all()
    assert out_BC.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- messages


def test_each_layer_sends_two_messages_of_the_stated_size() -> None:
    backend = CountingBackend()
    network = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    convert_batch_norm(network, backend, 1, [[0]], 1)
    network(torch.randn(4, 3, 5, 5)).sum().backward()
    assert [name for name, _ in backend.sent] == ["1.statistics", "4.statistics", "4.gradients", "1.gradients"]
    (six_forward, six_backward), (four_forward, four_backward) = (message_bytes(c, torch.float32) for c in (6, 4))
    assert [size for _, size in backend.sent] == [six_forward, four_forward, four_backward, six_backward]


@pytest.mark.parametrize("partial_bn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_plan_says_what_a_step_sends(dtype: torch.dtype, partial_bn: bool) -> None:
    backend = CountingBackend()
    network = build_network("resnet18", 10, num_frames=2, partial_bn=partial_bn).to(dtype)
    convert_batch_norm(network, backend, 1, [[0]], accumulation=2)
    network.train()
    for _ in range(2):
        network(torch.randn(2, 2, 3, 32, 32, dtype=dtype)).sum().backward()
    execution = Execution(world=2, global_batch=8, micro_batch=2, accumulation=2, bn_ghosts=1, bn_ranks=2)
    assert batch_norm_messages(network, execution) == (len(backend.sent), sum(size for _, size in backend.sent))
    assert batch_norm_messages(network, replace(execution, bn_ranks=1)) == (0, 0)


def test_what_a_resnet50_sends_is_known() -> None:
    """A ResNet-50 has 53 norms with 26,560 channels: (2C + 1) float64 forward, 2C float32 backward."""
    execution = Execution(world=2, global_batch=2, micro_batch=1, accumulation=1, bn_ghosts=1, bn_ranks=2)
    with torch.device("meta"):
        network = build_network("resnet50", 400)
    assert batch_norm_messages(network, execution) == (106, 26_560 * (16 + 8) + 53 * 8)
    assert describe_batch_norm(network, execution) == ["bn sums    106 messages per step, 0.64 MB per process"]


def test_frozen_norms_and_evaluation_send_nothing() -> None:
    backend = CountingBackend()
    network = build_network("resnet18", 10, num_frames=2, partial_bn=True)
    convert_batch_norm(network, backend, 1, [[0]], 1)
    norms = [module for module in network.modules() if isinstance(module, GroupBatchNorm)]
    before = [norm.running_var.clone() for norm in norms]  # type: ignore[union-attr]
    network.train()
    network(torch.randn(2, 2, 3, 32, 32)).sum().backward()
    assert [name for name, _ in backend.sent] == ["backbone.bn1.statistics", "backbone.bn1.gradients"]
    moved = [not norm.running_var.equal(old) for norm, old in zip(norms, before, strict=True)]  # type: ignore[union-attr]
    assert moved == [True] + [False] * (len(norms) - 1)
    network.eval()
    network(torch.randn(2, 2, 3, 32, 32))
    assert len(backend.sent) == 2


def test_a_layer_whose_input_needs_no_gradient_sends_none() -> None:
    backend = CountingBackend()
    network = nn.Sequential(nn.BatchNorm2d(3))
    convert_batch_norm(network, backend, 1, [[0]], 1)
    network(torch.randn(4, 3, 5, 5)).sum().backward()
    assert [name for name, _ in backend.sent] == ["0.statistics"]


# -------------------------------------------------------------------------------------------------------------- conversion


def test_conversion_of_a_network_keeps_its_tensors_modes_and_what_is_frozen() -> None:
    network = build_network("resnet50", 10, num_frames=2, non_local=True).double()
    frozen = network.get_submodule("backbone.layer2.0.bn2")
    frozen.eval().requires_grad_(False)
    tensors = network.state_dict(keep_vars=True)
    learns = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    modes = {name: module.training for name, module in network.named_modules()}
    convert_batch_norm(network, CountingBackend(), 2, [], 1)
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(tensors)
    # The same objects, so dtype and device are unchanged too.
    assert all(after[name] is tensors[name] for name in tensors)
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == learns
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert not any(type(module) in (nn.BatchNorm2d, nn.BatchNorm3d) for module in network.modules())
    assert sum(isinstance(module, nn.BatchNorm3d | GroupBatchNorm) for module in network.modules()) == 53 + 5


def test_a_norm_in_two_places_stays_one() -> None:
    norm = nn.BatchNorm2d(3)
    network = nn.Sequential(nn.Sequential(norm), nn.Sequential(norm), norm)
    convert_batch_norm(network, CountingBackend(), 1, [], 1)
    first: Any = network[0]
    second: Any = network[1]
    assert isinstance(network[2], GroupBatchNorm)
    assert first[0] is second[0] is network[2]


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}])
def test_norms_without_running_averages_are_refused_by_name(options: dict[str, Any]) -> None:
    network = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3, **options)))
    with pytest.raises(ValueError, match=r"batch norm 0\.0: .*Fix: "):
        convert_batch_norm(network, CountingBackend(), 1, [], 1)


def test_a_bare_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nn\.Sequential"):
        convert_batch_norm(nn.BatchNorm2d(3), CountingBackend(), 1, [], 1)


def test_a_copy_of_a_network_stays_in_its_world() -> None:
    backend = CountingBackend()
    network = nn.Sequential(nn.BatchNorm2d(3))
    convert_batch_norm(network, backend, 1, [[0]], 1)
    twin: Any = copy.deepcopy(network)
    assert twin[0].layout.backend is backend
    twin(torch.randn(4, 3, 2, 2))
    assert len(backend.sent) == 1


# ------------------------------------------------------------------------------------------------- ghosts and accumulation


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_ghosts_are_groups_of_their_own(memory_format: torch.memory_format) -> None:
    plain = random_norm(nn.BatchNorm2d, 3)
    holder: Any = nn.Sequential(copy.deepcopy(plain))
    convert_batch_norm(holder, CountingBackend(), 3, [], 1)
    x = torch.randn(12, 3, 4, 4, dtype=torch.float64).contiguous(memory_format=memory_format)
    grad = torch.randn(12, 3, 4, 4, dtype=torch.float64)
    out, grad_x = passed(holder, x, grad)
    each = [copy.deepcopy(plain) for _ in range(3)]
    pairs = [passed(norm, *part) for norm, part in zip(each, zip(x.chunk(3), grad.chunk(3), strict=True), strict=True)]
    torch.testing.assert_close(out, torch.cat([pair[0] for pair in pairs]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_x, torch.cat([pair[1] for pair in pairs]), rtol=1e-12, atol=1e-12)
    for name in ("running_mean", "running_var"):
        mean_C = torch.stack([getattr(norm, name) for norm in each]).mean(0)
        torch.testing.assert_close(getattr(holder[0], name), mean_C, rtol=1e-12, atol=1e-12)


def test_ghosts_that_do_not_fit_are_refused() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3))
    convert_batch_norm(network, CountingBackend(), 3, [], 1)
    with pytest.raises(ValueError, match="8 frames do not divide into 3"):
        network(torch.randn(8, 3, 2, 2))


# --------------------------------------------------------------------------------------------------------------- precise BN


def small_network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    ).double()


def population_by_hand(network: nn.Sequential, groups: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance before each norm over all groups, with each layer normalised per group (arXiv:2105.07576)."""
    first, second = network[1], network[5]
    assert isinstance(first, nn.BatchNorm2d)
    assert isinstance(second, nn.BatchNorm2d)
    inputs: list[list[Tensor]] = [[], []]
    for x_BCHW in groups:
        inputs[0].append(network[0](x_BCHW))
        mean_1C11, var_1C11 = inputs[0][-1].mean((0, 2, 3), True), inputs[0][-1].var((0, 2, 3), False, keepdim=True)
        normal_BCHW = (inputs[0][-1] - mean_1C11) / (var_1C11 + first.eps).sqrt()
        # Weight is 1, bias is 0, and dropout is off.
        inputs[1].append(network[4](normal_BCHW.relu()))
    return [
        (torch.cat(seen).mean((0, 2, 3)).detach(), torch.cat(seen).var((0, 2, 3), correction=0).detach())
        for seen in inputs
    ]


@pytest.mark.parametrize(
    ("ghosts", "rank_groups"), [(1, []), (2, []), (1, [[0]])], ids=["local", "ghosts", "over_ranks"]
)
def test_recomputed_statistics_are_those_of_all_groups(ghosts: int, rank_groups: list[list[int]]) -> None:
    """Variance of all values: E[mean^2 + var] - E[mean]^2 over groups of equal size."""
    network = small_network()
    batches = [torch.randn(4, 3, 9, 9, dtype=torch.float64) * scale + scale for scale in (1, 2, 3)]
    expected = population_by_hand(copy.deepcopy(network), [part for batch in batches for part in batch.chunk(ghosts)])
    backend = CountingBackend()
    convert_batch_norm(network, backend, ghosts, rank_groups, accumulation=2)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    recompute_running_statistics(network, backend, iter(batches))
    for norm, (mean_C, var_C) in zip((network[1], network[5]), expected, strict=True):
        torch.testing.assert_close(norm.running_mean, mean_C, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.running_var, var_C, rtol=1e-10, atol=1e-12)
    assert all(new.equal(old) and new.grad is None for new, old in zip(network.parameters(), before, strict=True))
    assert backend.sent[-1][0] == "population_statistics"


def test_recomputing_leaves_modes_and_frozen_layers_alone() -> None:
    network = small_network()
    convert_batch_norm(network, CountingBackend(), 1, [], 1)
    frozen: Any = network[5].eval()
    modes = [module.training for module in network.modules()]
    old = frozen.running_var.clone()
    recompute_running_statistics(network, CountingBackend(), [torch.randn(4, 3, 9, 9, dtype=torch.float64)])
    assert [module.training for module in network.modules()] == modes
    assert frozen.running_var.equal(old)
    trained: Any = network[1]
    assert not trained.running_mean.equal(torch.zeros(4))
    assert trained.population is None


def test_training_goes_on_from_recomputed_statistics() -> None:
    network: Any = small_network()
    convert_batch_norm(network, CountingBackend(), 1, [[0]], 1)
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    recompute_running_statistics(network, CountingBackend(), [x])
    precise_C = network[1].running_mean.clone()
    network(x + 1)
    seen_C = network[0](x + 1).mean((0, 2, 3))
    torch.testing.assert_close(network[1].running_mean, 0.9 * precise_C + 0.1 * seen_C, rtol=1e-12, atol=1e-12)


def test_recomputing_from_nothing_is_refused() -> None:
    network = small_network()
    convert_batch_norm(network, CountingBackend(), 1, [], 1)
    with pytest.raises(ValueError, match="no batches"):
        recompute_running_statistics(network, CountingBackend(), [])


def test_networks_without_batch_norm_need_nothing() -> None:
    network, backend = nn.Sequential(nn.Linear(2, 2)), CountingBackend()
    recompute_running_statistics(network, backend, [])
    average_running_statistics(network, backend)
    assert backend.sent == []


# --------------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_a_gpu_gives_what_a_cpu_gives(shape: str, affine: bool, dtype: torch.dtype) -> None:
    size, kind, memory_format = SHAPES[shape]
    on_cpu = synchronized(random_norm(kind, size[1], affine=affine))
    on_gpu = copy.deepcopy(on_cpu).to("cuda", dtype)
    x = (3 * torch.randn(size, dtype=dtype) + 2).contiguous(memory_format=memory_format)
    grad = torch.randn(size, dtype=dtype).contiguous(memory_format=memory_format)
    expected = passed(on_cpu, x.double(), grad.double())
    found = passed(on_gpu, x.cuda(), grad.cuda())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.stride() == x.stride()
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=tolerance, atol=tolerance)
    tensors = [[*(p.grad for p in norm.parameters()), norm.running_mean, norm.running_var] for norm in (on_gpu, on_cpu)]
    for mine, theirs in zip(*tensors, strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_on_a_gpu_is_as_near_as_its_rounding(shape: str, dtype: torch.dtype) -> None:
    size, kind, memory_format = SHAPES[shape]
    norm = random_norm(kind, size[1]).float().cuda()
    ours, exact = synchronized(norm), copy.deepcopy(norm).double()
    x = torch.randn(size, device="cuda").to(dtype).contiguous(memory_format=memory_format)
    grad = torch.randn(size, device="cuda").to(dtype)
    out, grad_x = passed(ours, x, grad)
    expected, expected_grad_x = passed(exact, x.double(), grad.double())
    step = torch.finfo(dtype).eps
    assert out.dtype == grad_x.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=step, atol=step)
    torch.testing.assert_close(grad_x.double(), expected_grad_x, rtol=2 * step, atol=2 * step)
    torch.testing.assert_close(ours.running_var.double(), exact.running_var, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.fake_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_never_makes_the_host_wait(shape: str, dtype: torch.dtype) -> None:
    size, kind, memory_format = SHAPES[shape]
    ours = synchronized(
        random_norm(kind, size[1]).to("cuda", torch.float64 if dtype == torch.float64 else torch.float32)
    )
    x = torch.randn(size, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
    grad = torch.randn_like(x)
    # Warm up: compiles the kernels.
    passed(ours, x, grad)
    try:
        # Setting the mode warns. Where warnings are errors the mode would stay on, so set it inside the try.
        torch.cuda.set_sync_debug_mode("error")
        out, grad_x = passed(ours, x, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.dtype == grad_x.dtype == dtype
    assert out.stride() == grad_x.stride() == x.stride()


@pytest.mark.gpu
def test_recomputing_on_a_gpu_gives_what_a_cpu_gives() -> None:
    network = small_network()
    convert_batch_norm(network, CountingBackend(), 1, [[0]], accumulation=2)
    twin, batches = copy.deepcopy(network).cuda(), [torch.randn(4, 3, 9, 9, dtype=torch.float64) for _ in range(2)]
    recompute_running_statistics(network, CountingBackend(), batches)
    recompute_running_statistics(twin, CountingBackend("cuda"), [batch.cuda() for batch in batches])
    for name, buffer_C in network.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name).cpu(), buffer_C, rtol=1e-10, atol=1e-12)

"""The message of batch norm over ranks, by torch operators and by Triton kernels in Triton's interpreter."""

import re
from types import ModuleType

import pytest
import torch
from torch import Tensor

from distributed.batch_norm import messages as messages_torch
from distributed.batch_norm.messages import COUNT_PARTS, GroupStatistics, RunningUpdate

EPS = 1e-3
DECAY, GAIN = 0.7, 0.3


def parts(channels: int, dtype: torch.dtype, offset: float = 3.0) -> list[Tensor]:
    """Values of two ranks, with different counts and means, (values, C)."""
    generator = torch.Generator().manual_seed(channels)
    scale_C = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
    sizes_and_offsets = ((37, offset), (90, 2 * offset))
    return [
        (torch.randn(n, channels, generator=generator, dtype=torch.float64) * scale_C + m).to(dtype)
        for n, m in sizes_and_offsets
    ]


def running(channels: int, dtype: torch.dtype) -> RunningUpdate:
    return RunningUpdate(torch.full((channels,), 2.0, dtype=dtype), torch.ones(channels, dtype=dtype), DECAY, GAIN)


def group_statistics(
    messages: ModuleType, parts_VC: list[Tensor], update: RunningUpdate | None
) -> tuple[GroupStatistics, Tensor]:
    """Statistics of the parts as one group, and the sum of their messages."""
    packed = []
    for x_VC in parts_VC:
        var_C, mean_C = torch.var_mean(x_VC, 0, correction=0)
        packed.append(messages.pack_moments(mean_C, var_C, len(x_VC)))
    message = torch.stack(packed).sum(0)
    return messages.unpack_statistics(message.clone(), parts_VC[0].dtype, EPS, update), message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 5, 128, 300])
def test_the_message_gives_the_statistics_of_the_whole_group(
    messages: ModuleType, channels: int, dtype: torch.dtype
) -> None:
    parts_VC = parts(channels, dtype)
    update = running(channels, dtype)
    statistics, message = group_statistics(messages, parts_VC, update)
    whole_VC = torch.cat(parts_VC).double()
    var_C, mean_C = torch.var_mean(whole_VC, 0, correction=0)
    unbiased_var_C = whole_VC.var(0)
    assert message.dtype == torch.float64 and message.shape == (2 * channels + 1,)
    assert message[-1] == len(whole_VC) == statistics.count_parts.sum()
    assert statistics.count_parts.dtype == torch.int32
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    expected = {
        "mean_C": mean_C,
        "inverse_std_C": (var_C + EPS).rsqrt(),
        "unbiased_var_C": unbiased_var_C,
    }
    for name, value_C in expected.items():
        found_C = getattr(statistics, name)
        assert found_C.dtype == dtype and found_C.is_contiguous()
        torch.testing.assert_close(found_C.double(), value_C, rtol=tolerance, atol=tolerance)
    for found_C, start, value_C in ((update.mean_C, 2.0, mean_C), (update.var_C, 1.0, unbiased_var_C)):
        assert found_C.dtype == dtype
        torch.testing.assert_close(found_C.double(), DECAY * start + GAIN * value_C, rtol=tolerance, atol=tolerance)


def test_without_running_statistics_the_rest_is_the_same(messages: ModuleType) -> None:
    with_update, _ = group_statistics(messages, parts(5, torch.float32), running(5, torch.float32))
    without, _ = group_statistics(messages, parts(5, torch.float32), None)
    for one, other in zip(with_update, without, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernels_give_what_torch_gives(interpreted: ModuleType, dtype: torch.dtype) -> None:
    """Kernels and torch also agree far from zero, where a float32 message would lose digits."""
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 3e-7, "atol": 1e-7}
    for offset in (0.0, 1e3):
        parts_VC = parts(200, dtype, offset)
        updates = [running(200, dtype) for _ in range(2)]
        kernel, message = group_statistics(interpreted, parts_VC, updates[0])
        twin, expected_message = group_statistics(messages_torch, parts_VC, updates[1])
        torch.testing.assert_close(message, expected_message, rtol=1e-15, atol=0)
        for one, other in zip((*kernel, *updates[0]), (*twin, *updates[1]), strict=True):
            torch.testing.assert_close(one, other, **tolerance)  # type: ignore[arg-type]


def test_counts_beyond_int32_are_exact(messages: ModuleType) -> None:
    # 1,536 GPUs with 64 clips of 8 frames of 112 x 112 pixels, plus a few.
    total = 9_864_000_005
    message = torch.tensor([0.0, total, total], dtype=torch.float64)
    statistics = messages.unpack_statistics(message, torch.float32, EPS, None)
    assert statistics.count_parts.shape == (COUNT_PARTS,)
    assert statistics.count_parts.sum(dtype=torch.int64) == total


# numpy warns inside Triton's interpreter.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_variances_are_not_negative_and_stay_nan(messages: ModuleType) -> None:
    """Rounding makes the variance of a constant channel negative: clamp it. An overflowed channel stays NaN for the guard."""
    n, mean_C = 10.0, torch.tensor([1e5 + 0.1, float("nan"), float("inf")], dtype=torch.float64)
    second_C = mean_C.square() * (1 - 1e-15)
    message = torch.cat([n * mean_C, n * second_C, torch.tensor([n], dtype=torch.float64)])
    update = running(3, torch.float32)
    statistics = messages.unpack_statistics(message, torch.float32, EPS, update)
    assert statistics.unbiased_var_C[0] == 0
    assert statistics.inverse_std_C[0] == pytest.approx(EPS**-0.5)
    assert update.var_C[0] == pytest.approx(DECAY)
    assert statistics.unbiased_var_C[1:].isnan().all() and update.var_C[1:].isnan().all()


@pytest.mark.parametrize("kernel", ["_pack_kernel", "_unpack_kernel"])
def test_compiled_for_an_h100_all_arithmetic_is_float64(kernel: str) -> None:
    """A Python float that Triton passed as float32 would change eps by 6e-9, in float64 too."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from distributed.batch_norm import messages_triton

    types = {"message_ptr": "*fp64", "count_parts_ptr": "*i32", "channels": "i32", "count": "i32"}
    constants = {"BLOCK": 128, "COUNT_PARTS": COUNT_PARTS, "HAS_RUNNING": True}
    function = getattr(messages_triton, kernel)
    floats = [name for name in ("eps", "decay", "gain") if name in function.arg_names]
    signature = {name: types.get(name, "*fp32") for name in function.arg_names}
    signature |= {name: "constexpr" for name in constants if name in signature}
    signature |= {param.name: param.annotation_type for param in function.params if param.annotation_type}
    source = ASTSource(function, signature, {name: constants[name] for name in constants if name in signature})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert len(re.findall(r"\.param \.f64", ptx)) == len(floats)
    assert re.search(r"(mul|add|div|fma)[.\w]*\.f64", ptx)
    assert not re.search(r"(mul|add|sub|div|fma|sqrt|neg)[.\w]*\.f32", ptx)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_running_statistics_take_one_step_towards_the_mean_of_the_micro_steps(
    messages: ModuleType, accumulation: int
) -> None:
    start_C, new_KC = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.randn(accumulation, 2, dtype=torch.float64)
    mean_C, var_C = start_C.clone(), start_C.abs()
    for step, mean_of_group_C in enumerate(new_KC):
        update = RunningUpdate(mean_C, var_C, 0.9 if step == 0 else 1.0, 0.1 / accumulation)
        message = messages.pack_moments(mean_of_group_C, torch.ones(2, dtype=torch.float64), 4)
        messages.unpack_statistics(message, torch.float64, EPS, update)
    torch.testing.assert_close(mean_C, 0.9 * start_C + 0.1 * new_KC.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var_C, 0.9 * start_C.abs() + 0.1 * 4 / 3, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 5, 128, 2048])
def test_compiled_kernels_give_what_torch_gives(channels: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from distributed.batch_norm import messages_triton

    parts_VC = parts(channels, dtype)
    updates = [running(channels, dtype) for _ in range(2)]
    on_gpu = RunningUpdate(updates[0].mean_C.cuda(), updates[0].var_C.cuda(), DECAY, GAIN)
    kernel, message = group_statistics(messages_triton, [x_VC.cuda() for x_VC in parts_VC], on_gpu)
    twin, expected_message = group_statistics(messages_torch, parts_VC, updates[1])
    tolerance = 1e-9 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(message.cpu(), expected_message, rtol=tolerance, atol=0)
    for one, other in zip((*kernel, *on_gpu[:2]), (*twin, *updates[1][:2]), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance)

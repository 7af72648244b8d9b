"""Batch norm over ranks as CUDA computes it: its message, its Triton kernels in Triton's interpreter, and its formulas on CPUs."""

import importlib.util
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed.batch_norm import messages as messages_torch
from distributed.batch_norm import synchronized_cuda as synchronized_norm_cuda
from distributed.batch_norm.messages import COUNT_PARTS, GroupStatistics, RunningUpdate
from distributed.batch_norm.synchronized_cuda import synchronized_norm_cuda as norm_cuda

EPS = 1e-3
DECAY, GAIN = 0.7, 0.3


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """`messages_triton` with its kernels in Triton's interpreter, which takes CPU tensors."""
    pytest.importorskip("triton")
    path = Path(messages_torch.__file__).with_name("messages_triton.py")
    spec = importlib.util.spec_from_file_location("distributed.batch_norm.messages_interpreted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is decorated
        spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["torch", "triton"])
def messages(request: pytest.FixtureRequest) -> ModuleType:
    return request.getfixturevalue("interpreted") if request.param == "triton" else messages_torch


def parts(channels: int, dtype: torch.dtype, offset: float = 3.0) -> list[Tensor]:
    """Two ranks' values, of unlike sizes and means, (values, C)."""
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
    """Far from zero too, where digits are lost if either computes the message in float32."""
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
    total = 9_864_000_005  # 1,536 GPUs with 64 clips of 8 frames of 112 x 112 pixels, and some
    message = torch.tensor([0.0, total, total], dtype=torch.float64)
    statistics = messages.unpack_statistics(message, torch.float32, EPS, None)
    assert statistics.count_parts.shape == (COUNT_PARTS,)
    assert statistics.count_parts.sum(dtype=torch.int64) == total


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, Triton's interpreter
def test_variances_are_not_negative_and_stay_nan(messages: ModuleType) -> None:
    """A constant channel, whose variance rounding makes negative, and one that has overflowed: the guard has to see that."""
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

    from distributed.batch_norm import messages_triton as norm_messages_triton

    types = {"message_ptr": "*fp64", "count_parts_ptr": "*i32", "channels": "i32", "count": "i32"}
    constants = {"BLOCK": 128, "COUNT_PARTS": COUNT_PARTS, "HAS_RUNNING": True}
    function = getattr(norm_messages_triton, kernel)
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


# ------------------------------------------------------------------------------ CUDA's formulas, with its kernels written out


def by_channel(value_C: Tensor | None, x_BC: Tensor, default: float) -> Tensor:
    shape = [-1 if dim == 1 else 1 for dim in range(x_BC.dim())]
    return torch.full_like(x_BC[:1, :1], default) if value_C is None else value_C.view(shape)


def channel_sum(x_BC: Tensor) -> Tensor:
    return x_BC.sum([dim for dim in range(x_BC.dim()) if dim != 1])


def elemt(
    x_BC: Tensor, weight_C: Any, bias_C: Any, mean_C: Tensor, inverse_std_C: Tensor, eps: float, *, out: Tensor
) -> Tensor:
    """`torch.batch_norm_elemt`: Normalization.cuh, batch_norm_transform_input_kernel."""
    assert x_BC.dim() <= 4
    centered_BC = x_BC - by_channel(mean_C, x_BC, 0)
    scale_C = by_channel(weight_C, x_BC, 1) * by_channel(inverse_std_C, x_BC, 1)
    return out.copy_(centered_BC * scale_C + by_channel(bias_C, x_BC, 0))


def backward_reduce(
    grad_BC: Tensor, x_BC: Tensor, mean_C: Tensor, inverse_std_C: Tensor, weight_C: Any, *wanted: bool
) -> tuple[Tensor | None, ...]:
    """`torch.batch_norm_backward_reduce`: Normalization.cuh, batch_norm_backward_reduce_kernel."""
    assert x_BC.stride() == grad_BC.stride() and x_BC.dim() <= 4
    assert wanted == (True, weight_C is not None, weight_C is not None)
    sum_C = channel_sum(grad_BC.to(mean_C.dtype))
    sum_centered_C = channel_sum(grad_BC.to(mean_C.dtype) * (x_BC - by_channel(mean_C, x_BC, 0)))
    return sum_C, sum_centered_C, sum_centered_C * inverse_std_C, sum_C.clone()


def backward_elemt(
    grad_BC: Tensor,
    x_BC: Tensor,
    mean_C: Tensor,
    inverse_std_C: Tensor,
    weight_C: Any,
    sum_C: Tensor,
    sum_centered_C: Tensor,
    count: Tensor,
) -> Tensor:
    """`torch.batch_norm_backward_elemt`: Normalization.cuh, batch_norm_backward_elemt_kernel_impl."""
    assert count.dtype == torch.int32 and count.is_contiguous()
    total = count.sum(dtype=torch.int64)
    slope_C = by_channel(inverse_std_C.square() * sum_centered_C / total, x_BC, 0)
    centered_BC = x_BC - by_channel(mean_C, x_BC, 0)
    grad_x_BC = grad_BC - by_channel(sum_C / total, x_BC, 0) - centered_BC * slope_C
    return (grad_x_BC * by_channel(inverse_std_C, x_BC, 1) * by_channel(weight_C, x_BC, 1)).to(x_BC.dtype)


def update_stats(x_BC: Tensor, running_mean_C: None, running_var_C: None, momentum: float) -> tuple[Tensor, Tensor]:
    """`torch.batch_norm_update_stats` as on CUDA, where statistics of half precision are float32."""
    dims = [dim for dim in range(x_BC.dim()) if dim != 1]
    var_C, mean_C = torch.var_mean(x_BC if x_BC.dtype == torch.float64 else x_BC.float(), dims, correction=0)
    return mean_C, var_C


@pytest.fixture
def cuda_kernels(messages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA path on CPU tensors: torch's kernels are the formulas above."""
    for function in (elemt, backward_reduce, backward_elemt, update_stats):
        monkeypatch.setattr(torch, f"batch_norm_{function.__name__}", function)
    lock = threading.Lock()  # Triton's interpreter takes one kernel at a time

    def alone(function: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*arguments: Any) -> Any:
            with lock:
                return function(*arguments)

        return locked

    kernels = SimpleNamespace(
        pack_moments=alone(messages.pack_moments), unpack_statistics=alone(messages.unpack_statistics)
    )
    monkeypatch.setattr(synchronized_norm_cuda, "message_kernels", lambda: kernels)


class Ranks:
    """Threads as ranks: each runs the same code, and sums meet at a barrier."""

    def __init__(self, size: int) -> None:
        self.parts: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)
        self.kinds: list[str] = []

    def sum_of(self, rank: int) -> Callable[[Tensor, str], None]:
        def sum_over_group(x: Tensor, kind: str) -> None:
            assert x.is_contiguous()
            self.parts[rank] = x.clone()
            self.barrier.wait()
            x.copy_(torch.stack(self.parts).sum(0))
            self.barrier.wait()
            if rank == 0:
                self.kinds.append(kind)

        return sum_over_group

    def run(self, body: Callable[[int], Any]) -> list[Any]:
        def one(rank: int) -> Any:
            try:
                return body(rank)
            except BaseException:
                self.barrier.abort()  # or the others would wait for this rank
                raise

        with ThreadPoolExecutor(len(self.parts)) as pool:
            return list(pool.map(one, range(len(self.parts))))


LAYOUTS = {
    "columns": ((9, 5), torch.contiguous_format),
    "images": ((9, 5, 4, 3), torch.contiguous_format),
    "images_channels_last": ((9, 5, 4, 3), torch.channels_last),
    "clips": ((9, 5, 2, 4, 3), torch.contiguous_format),
    "clips_channels_last": ((9, 5, 2, 4, 3), torch.channels_last_3d),
}


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_give_what_torch_gives_on_their_values_together(layout: str, affine: bool) -> None:
    size, memory_format = LAYOUTS[layout]
    plain: Any = nn.BatchNorm1d(5, EPS, GAIN, affine).double()
    plain._check_input_dim = lambda x: None
    for parameter in plain.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    x_BC = (3 * torch.randn(size, dtype=torch.float64) + 2).contiguous(memory_format=memory_format).requires_grad_()
    grad_BC = torch.randn(size, dtype=torch.float64)
    plain(x_BC).backward(grad_BC)
    ranks, sizes = Ranks(2), [3, 6]  # unlike parts
    x_parts, grad_parts = x_BC.detach().split(sizes), grad_BC.split(sizes)

    def one_rank(rank: int) -> tuple[Tensor, ...]:
        part_BC = x_parts[rank].clone(memory_format=torch.preserve_format).requires_grad_()
        affine_C = [p.detach().clone().requires_grad_() for p in plain.parameters()]
        weight_C, bias_C = affine_C or (None, None)
        update = running(5, torch.float64)
        out_BC, *_ = norm_cuda(part_BC, weight_C, bias_C, EPS, ranks.sum_of(rank), update)
        out_BC.backward(grad_parts[rank])
        assert part_BC.grad is not None
        assert out_BC.stride() == part_BC.grad.stride() == part_BC.stride()
        assert out_BC._base is None  # or a change of it in place would cost copies
        return out_BC.detach(), part_BC.grad, *(p.grad for p in affine_C), update.mean_C, update.var_C  # type: ignore[misc]

    found = ranks.run(one_rank)
    assert ranks.kinds == ["statistics", "gradients"]
    assert x_BC.grad is not None
    with torch.no_grad():
        expected_out_BC = nn.functional.batch_norm(x_BC, None, None, plain.weight, plain.bias, True, 0.0, EPS)
    for number, expected_BC in enumerate((expected_out_BC, x_BC.grad)):
        joined_BC = torch.cat([one[number] for one in found])
        torch.testing.assert_close(joined_BC, expected_BC, rtol=1e-11, atol=1e-12)
    for number, parameter in enumerate(plain.parameters()):
        torch.testing.assert_close(found[0][2 + number] + found[1][2 + number], parameter.grad, rtol=1e-11, atol=1e-12)
    for one in found:
        start_and_end = ((2.0, plain.running_mean), (1.0, plain.running_var - DECAY))
        for running_C, (start, new_C) in zip(one[-2:], start_and_end, strict=True):
            expected_C = new_C + DECAY * start
            torch.testing.assert_close(running_C, expected_C, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_and_messages_are_float32_at_least(dtype: torch.dtype) -> None:
    sent: list[torch.dtype] = []
    x_BCHW = (torch.randn(8, 6, 9, 9) + 4).to(dtype).requires_grad_()
    weight_C, bias_C = (torch.rand(6, requires_grad=True) for _ in range(2))
    out_BCHW, mean_C, unbiased_var_C, count = norm_cuda(
        x_BCHW, weight_C, bias_C, EPS, lambda message, kind: sent.append(message.dtype)
    )
    out_BCHW.backward(torch.randn(8, 6, 9, 9).to(dtype))
    assert x_BCHW.grad is not None
    assert out_BCHW.dtype == x_BCHW.grad.dtype == dtype
    assert mean_C.dtype == unbiased_var_C.dtype == torch.float32
    assert count == 8 * 9 * 9
    assert sent == [torch.float64, torch.float32]
    step = torch.finfo(dtype).eps
    expected = nn.functional.batch_norm(x_BCHW.double(), None, None, weight_C.double(), bias_C.double(), True, 0, EPS)
    torch.testing.assert_close(out_BCHW.double(), expected, rtol=step, atol=max(step, 1e-5))


@pytest.mark.usefixtures("cuda_kernels")
def test_a_layer_whose_input_needs_no_gradient_sends_none() -> None:
    kinds: list[str] = []
    weight_C, bias_C = (torch.rand(3, requires_grad=True) for _ in range(2))
    out_BC, *_ = norm_cuda(torch.randn(4, 3), weight_C, bias_C, EPS, lambda message, kind: kinds.append(kind))
    out_BC.sum().backward()
    assert kinds == ["statistics"]
    torch.testing.assert_close(bias_C.grad, torch.full((3,), 4.0))


# ----------------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 5, 128, 2048])
def test_compiled_kernels_give_what_torch_gives(channels: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from distributed.batch_norm import messages_triton as norm_messages_triton

    parts_VC = parts(channels, dtype)
    updates = [running(channels, dtype) for _ in range(2)]
    on_gpu = RunningUpdate(updates[0].mean_C.cuda(), updates[0].var_C.cuda(), DECAY, GAIN)
    kernel, message = group_statistics(norm_messages_triton, [x_VC.cuda() for x_VC in parts_VC], on_gpu)
    twin, expected_message = group_statistics(messages_torch, parts_VC, updates[1])
    tolerance = 1e-9 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(message.cpu(), expected_message, rtol=tolerance, atol=0)
    for one, other in zip((*kernel, *on_gpu[:2]), (*twin, *updates[1][:2]), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not layout.startswith("clips")])
def test_torchs_kernels_do_what_is_written_out_here(layout: str, dtype: torch.dtype) -> None:
    """The formulas in which the tests above stand in for `torch.batch_norm_*`."""
    size, memory_format = LAYOUTS[layout]
    x_BC = torch.randn(size, device="cuda").to(dtype).contiguous(memory_format=memory_format)
    grad_BC = torch.randn_like(x_BC)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight_C, bias_C = torch.rand(2, 5, device="cuda", dtype=wide)
    count = torch.tensor([3, 4], dtype=torch.int32, device="cuda")
    mean_C, var_C = torch.batch_norm_update_stats(x_BC, None, None, 0.0)
    inverse_std_C = (var_C + EPS).rsqrt()
    found = torch.batch_norm_elemt(x_BC, weight_C, bias_C, mean_C, inverse_std_C, EPS, out=torch.empty_like(x_BC))
    arguments = (grad_BC, x_BC, mean_C, inverse_std_C, weight_C)
    sums = torch.batch_norm_backward_reduce(*arguments, True, True, True)
    grad_x_BC = torch.batch_norm_backward_elemt(*arguments, sums[0], sums[1], count)
    expected_sums = backward_reduce(*arguments, True, True, True)
    pairs = [
        (mean_C, update_stats(x_BC, None, None, 0.0)[0]),
        (var_C, update_stats(x_BC, None, None, 0.0)[1]),
        (found, elemt(x_BC, weight_C, bias_C, mean_C, inverse_std_C, EPS, out=torch.empty_like(x_BC))),
        *zip(sums, expected_sums, strict=True),
        (grad_x_BC, backward_elemt(*arguments, sums[0], sums[1], count)),
    ]
    step = max(torch.finfo(dtype).eps, 1e-10 if dtype == torch.float64 else 1e-5)
    for one, other in pairs:
        assert one.dtype == other.dtype  # type: ignore[union-attr]
        torch.testing.assert_close(one, other, rtol=2 * step, atol=2 * step)

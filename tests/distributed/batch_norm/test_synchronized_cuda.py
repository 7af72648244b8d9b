"""Batch norm over ranks on CUDA: the formulas of torch's kernels, on the CPU."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed.batch_norm import synchronized_cuda
from distributed.batch_norm.messages import RunningUpdate
from distributed.batch_norm.synchronized_cuda import synchronized_norm_cuda

EPS = 1e-3
DECAY, GAIN = 0.7, 0.3


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
    """`torch.batch_norm_update_stats` as on CUDA, where statistics of half-precision inputs are float32."""
    dims = [dim for dim in range(x_BC.dim()) if dim != 1]
    var_C, mean_C = torch.var_mean(x_BC if x_BC.dtype == torch.float64 else x_BC.float(), dims, correction=0)
    return mean_C, var_C


@pytest.fixture
def cuda_kernels(messages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the CUDA path on CPU tensors, with the formulas above in place of torch's kernels."""
    for function in (elemt, backward_reduce, backward_elemt, update_stats):
        monkeypatch.setattr(torch, f"batch_norm_{function.__name__}", function)
    # Triton's interpreter runs one kernel at a time.
    lock = threading.Lock()

    def alone(function: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*arguments: Any) -> Any:
            with lock:
                return function(*arguments)

        return locked

    kernels = SimpleNamespace(
        pack_moments=alone(messages.pack_moments), unpack_statistics=alone(messages.unpack_statistics)
    )
    monkeypatch.setattr(synchronized_cuda, "message_kernels", lambda: kernels)


class Ranks:
    """Threads as ranks: each runs the same code, and all-reduces meet at a barrier."""

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
                # Otherwise the other threads would wait for this rank.
                self.barrier.abort()
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
    # Parts of unequal size.
    ranks, sizes = Ranks(2), [3, 6]
    x_parts, grad_parts = x_BC.detach().split(sizes), grad_BC.split(sizes)

    def one_rank(rank: int) -> tuple[Tensor, ...]:
        part_BC = x_parts[rank].clone(memory_format=torch.preserve_format).requires_grad_()
        affine_C = [p.detach().clone().requires_grad_() for p in plain.parameters()]
        weight_C, bias_C = affine_C or (None, None)
        ones_C = torch.ones(5, dtype=torch.float64)
        update = RunningUpdate(2 * ones_C, ones_C.clone(), DECAY, GAIN)
        out_BC, *_ = synchronized_norm_cuda(part_BC, weight_C, bias_C, EPS, ranks.sum_of(rank), update)
        out_BC.backward(grad_parts[rank])
        assert part_BC.grad is not None
        assert out_BC.stride() == part_BC.grad.stride() == part_BC.stride()
        # A view as output would make a later in-place operation copy.
        assert out_BC._base is None
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
    out_BCHW, mean_C, unbiased_var_C, count = synchronized_norm_cuda(
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
    out_BC, *_ = synchronized_norm_cuda(
        torch.randn(4, 3), weight_C, bias_C, EPS, lambda message, kind: kinds.append(kind)
    )
    out_BC.sum().backward()
    assert kinds == ["statistics"]
    torch.testing.assert_close(bias_C.grad, torch.full((3,), 4.0))


# ----------------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not layout.startswith("clips")])
def test_torchs_kernels_do_what_is_written_out_here(layout: str, dtype: torch.dtype) -> None:
    """torch's CUDA kernels agree with the formulas that replace `torch.batch_norm_*` in the tests above."""
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
    pairs = [
        (mean_C, update_stats(x_BC, None, None, 0.0)[0]),
        (var_C, update_stats(x_BC, None, None, 0.0)[1]),
        (found, elemt(x_BC, weight_C, bias_C, mean_C, inverse_std_C, EPS, out=torch.empty_like(x_BC))),
        (grad_x_BC, backward_elemt(*arguments, sums[0], sums[1], count)),
    ]
    step = 2 * max(torch.finfo(dtype).eps, 1e-10 if dtype == torch.float64 else 1e-5)
    for one, other in pairs:
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=step, atol=step)
    # A sum of many values can be near 0, but has the rounding of its parts.
    parts = x_BC.numel() / x_BC.shape[1]
    for sum_C, expected_C in zip(sums, backward_reduce(*arguments, True, True, True), strict=True):
        assert expected_C is not None and sum_C.dtype == expected_C.dtype
        torch.testing.assert_close(sum_C, expected_C, rtol=step, atol=step * parts**0.5)

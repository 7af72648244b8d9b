"""The Triton kernel of the temporal shift: values in Triton's interpreter, and memory accesses compiled for sm_90."""

import importlib.util
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tsm import shift
from tsm.shift import OFFSETS, Direction, shift_by_slices, temporal_shift

triton = pytest.importorskip("triton")
from tsm import shift_triton  # noqa: E402  (only where Triton is installed)

DIRECTIONS: tuple[Direction, ...] = ("both", "past")
DTYPES = shift_triton.DTYPES
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# (N, T, C, H, W), fold_div: MobileNetV2's widths, odd fold sizes, one clip, one frame, frames of several programs.
CASES = [
    ((2, 3, 24, 2, 3), 8),
    ((1, 4, 32, 3, 3), 8),
    ((2, 1, 64, 2, 2), 8),
    ((1, 3, 96, 1, 1), 8),
    ((1, 3, 160, 6, 6), 8),
    ((3, 2, 20, 3, 1), 3),
    ((1, 5, 16, 2, 2), 2),
]


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """Second copy of the module, interpreted by Triton on CPU tensors; `triton.jit` reads the variable only once."""
    spec = importlib.util.spec_from_file_location("interpreted_shift_triton", str(shift_triton.__file__))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    assert type(module.shift_kernel) is not type(shift_triton.shift_kernel)
    return module


def laid_out(x_NTCHW: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        return x_NTCHW.contiguous()
    return x_NTCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x_NTCHW.shape[:2])


def samples(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Normal values, with some infinities, NaNs and negative zeros."""
    x_NTCHW = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for start, value in enumerate((torch.inf, -torch.inf, torch.nan, -0.0)):
        x_NTCHW.view(-1)[start::11] = value
    return laid_out(x_NTCHW, channels_last)


def assert_same_bits(one_NTCHW: Tensor, other_NTCHW: Tensor) -> None:
    assert one_NTCHW.dtype == other_NTCHW.dtype
    assert one_NTCHW.stride() == other_NTCHW.stride()
    bits = BITS[one_NTCHW.element_size()]
    # pytest prints the difference.
    one_NTCHW, other_NTCHW = one_NTCHW.cpu(), other_NTCHW.cpu()
    assert torch.equal(one_NTCHW.view(bits), other_NTCHW.view(bits))


def output_and_gradient(
    x_NTCHW: Tensor, grad_NTCHW: Tensor, fold_div: int, direction: Direction
) -> tuple[Tensor, Tensor]:
    leaf_NTCHW = x_NTCHW.detach().requires_grad_()
    out_NTCHW = temporal_shift(leaf_NTCHW, fold_div, direction)
    (x_grad_NTCHW,) = torch.autograd.grad(out_NTCHW, leaf_NTCHW, grad_NTCHW)
    return out_NTCHW.detach(), x_grad_NTCHW


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_outputs_and_gradients_are_the_slices_ones(
    interpreted: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    direction: Direction,
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    for shape, fold_div in CASES:
        x_NTCHW = samples(shape, dtype, channels_last)
        grad_NTCHW = samples(shape, dtype, channels_last).flip(1).neg()
        grad_NTCHW = laid_out(grad_NTCHW, channels_last)
        expected = output_and_gradient(x_NTCHW, grad_NTCHW, fold_div, direction)
        with monkeypatch.context() as patch:
            patch.setattr(shift, "_shift_tensor", interpreted.fused_shift)
            fused = output_and_gradient(x_NTCHW, grad_NTCHW, fold_div, direction)
        for one_NTCHW, other_NTCHW in zip(fused, expected, strict=True):
            assert_same_bits(one_NTCHW, other_NTCHW)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 16, 5), (1, 2, 8, 2, 2, 2)])
def test_any_shape_after_the_channels(interpreted: ModuleType, shape: tuple[int, ...]) -> None:
    x_NTC = samples(shape, torch.float32, channels_last=False)
    assert_same_bits(interpreted.fused_shift(x_NTC, 2, (1, -1)), shift_by_slices(x_NTC, 2, (1, -1)))


def test_a_view_that_begins_between_two_accesses(interpreted: ModuleType) -> None:
    x_NTC = torch.randn(1 + 2 * 3 * 32)[1:].view(2, 3, 32)
    assert_same_bits(interpreted.fused_shift(x_NTC, 4, (1, -1)), shift_by_slices(x_NTC, 4, (1, -1)))


@pytest.mark.parametrize("shape", [(0, 3, 8, 2, 2), (2, 0, 8, 2, 2), (2, 3, 8, 0, 2)])
def test_empty_tensors_start_no_kernel(shape: tuple[int, ...]) -> None:
    # The kernel is compiled: a launch would fail without a GPU.
    out_NTCHW = shift_triton.fused_shift(torch.empty(shape), 1, (1, -1))
    assert out_NTCHW is not None
    assert out_NTCHW.shape == shape


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "x_NTC",
    [
        on_meta(2, 3, 8, 4, 4)[..., ::2],
        on_meta(3, 2, 8, 4, 4).transpose(0, 1),
        on_meta(2, 3, 8, dtype=torch.int32),
        on_meta(2, 3, 8, dtype=torch.complex64),
        on_meta(1, 1, 2, 2**29 + 1),
        on_meta(2**16, 2**15, 2),
    ],
    ids=[
        "gaps",
        "time before clips",
        "integers",
        "complex",
        "a frame beyond 32 bits",
        "more programs than a grid holds",
    ],
)
def test_what_the_kernel_does_not_serve(x_NTC: Tensor) -> None:
    assert shift_triton.fused_shift(x_NTC, 1, (1, -1)) is None


# --- Memory accesses --------------------------------------------------------------------------------------------------


def access_bytes(x_NTCHW: Tensor, fold: int) -> set[int]:
    """Compile the launch of `fused_shift` for sm_90; return the bytes of global loads and stores in its PTX."""
    launch = shift_triton.plan_launch(x_NTCHW, fold, (1, -1))
    assert launch is not None
    pointer = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}[
        x_NTCHW.dtype
    ]
    source = triton.compiler.ASTSource(
        shift_triton.shift_kernel,
        {"x_ptr": pointer, "out_ptr": pointer, **dict.fromkeys(shift_triton.SIZES, "i32")},
        constexprs={"WIDTH": launch.width, "BLOCK": launch.block},
        # torch's allocator aligns to 512 bytes.
        attrs={(argument,): [["tt.divisibility", 16]] for argument in (0, 1)},
    )
    ptx = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32)).asm["ptx"]
    accesses = re.findall(r"(ld|st)\.global\S*?(?:\.v(\d))?\.[bfu](\d+)", ptx)
    loads, stores = (
        [int(count or 1) * int(bits) // 8 for kind, count, bits in accesses if kind == which] for which in ("ld", "st")
    )
    # Each of the 128 threads moves its part once.
    assert sum(loads) == sum(stores) == shift_triton.BLOCK_BYTES // 128
    return {*loads, *stores}


@pytest.fixture
def triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.mark.usefixtures("triton_cache")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)])
def test_resnet50_takes_16_bytes_at_a_time(channels: int, size: int, dtype: torch.dtype, channels_last: bool) -> None:
    x_NTCHW = laid_out(on_meta(8, 8, channels, size, size, dtype=dtype), channels_last)
    assert access_bytes(x_NTCHW, channels // 8) == {16}


@pytest.mark.usefixtures("triton_cache")
@pytest.mark.parametrize(
    ("channels", "dtype", "expected"),
    [
        (24, torch.float16, 2),
        (32, torch.float16, 8),
        (96, torch.bfloat16, 8),
        (160, torch.float32, 16),
        (24, torch.float64, 8),
    ],
)
def test_folds_that_are_not_aligned_take_what_divides_them(channels: int, dtype: torch.dtype, expected: int) -> None:
    x_NTCHW = laid_out(on_meta(8, 8, channels, 14, 14, dtype=dtype), channels_last=True)
    assert access_bytes(x_NTCHW, channels // 8) == {expected}


# --- Dispatch ---------------------------------------------------------------------------------------------------------


def test_a_process_without_cuda_tensors_never_imports_triton() -> None:
    code = (
        "import sys, torch; from tsm.shift import temporal_shift; "
        "temporal_shift(torch.ones(1, 2, 8, requires_grad=True)).sum().backward(); "
        "sys.exit('triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpu_tensors_never_reach_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError

    monkeypatch.setattr(shift, "_fused_shift", fail)
    output_and_gradient(torch.randn(2, 3, 16), torch.randn(2, 3, 16), 8, "both")


def test_a_tracer_sees_the_operator_on_cuda() -> None:
    with FakeTensorMode():
        x_NTCHW = laid_out(torch.empty(2, 3, 16, 4, 4, device="cuda"), channels_last=True)
        out_NTCHW = temporal_shift(x_NTCHW)
        graph = make_fx(lambda x_NTCHW: temporal_shift(x_NTCHW))(x_NTCHW).graph
    assert out_NTCHW.stride() == x_NTCHW.stride()
    shifts = [node.args[1:] for node in graph.nodes if node.target is torch.ops.tsm.temporal_shift.default]
    assert shifts == [(2, [1, -1])]


@pytest.mark.parametrize("served", [True, False])
def test_the_slices_take_what_the_kernel_does_not_serve(monkeypatch: pytest.MonkeyPatch, served: bool) -> None:
    class OnCuda(Tensor):
        is_cuda = True

    answer = torch.zeros(1, 3, 8) if served else None
    monkeypatch.setattr(shift, "_fused_shift", lambda: lambda *_: answer)
    x_NTC = torch.randn(1, 3, 8)
    out_NTC = shift._shift_tensor(x_NTC.as_subclass(OnCuda), 1, (1, -1)).as_subclass(Tensor)
    assert torch.equal(out_NTC, torch.zeros(1, 3, 8) if served else shift_by_slices(x_NTC, 1, (1, -1)))


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_gpu_gives_the_slices_bits(
    monkeypatch: pytest.MonkeyPatch, direction: Direction, dtype: torch.dtype, channels_last: bool
) -> None:
    for shape, fold_div in [*CASES, ((2, 8, 64, 56, 56), 8), ((2, 8, 2048, 7, 7), 8)]:
        x_NTCHW = samples(shape, dtype, channels_last).cuda()
        grad_NTCHW = laid_out(x_NTCHW.flip(1).neg(), channels_last)
        assert shift_triton.plan_launch(x_NTCHW, shape[2] // fold_div, OFFSETS[direction]) is not None
        fused = output_and_gradient(x_NTCHW, grad_NTCHW, fold_div, direction)
        with monkeypatch.context() as patch:
            patch.setattr(shift, "_shift_tensor", shift_by_slices)
            expected = output_and_gradient(x_NTCHW, grad_NTCHW, fold_div, direction)
        for one_NTCHW, other_NTCHW in zip(fused, expected, strict=True):
            assert_same_bits(one_NTCHW, other_NTCHW)


@pytest.mark.gpu
def test_a_gpu_launches_one_kernel_each_way() -> None:
    x_NTCHW = samples((2, 8, 64, 14, 14), torch.bfloat16, channels_last=True).cuda()
    # Warm up: compiles the kernel.
    output_and_gradient(x_NTCHW, x_NTCHW, 8, "both")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        output_and_gradient(x_NTCHW, x_NTCHW, 8, "both")
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert kernels == ["shift_kernel", "shift_kernel"]


@pytest.mark.gpu
def test_torch_compile_on_a_gpu_gives_the_same_bits() -> None:
    x_NTCHW = samples((2, 8, 64, 7, 7), torch.float32, channels_last=True).cuda().requires_grad_()
    out_NTCHW = torch.compile(temporal_shift, fullgraph=True, backend="aot_eager")(x_NTCHW)
    (x_grad_NTCHW,) = torch.autograd.grad(out_NTCHW, x_NTCHW, x_NTCHW.detach())
    expected_NTCHW, expected_grad_NTCHW = output_and_gradient(x_NTCHW, x_NTCHW.detach(), 8, "both")
    assert_same_bits(out_NTCHW.detach(), expected_NTCHW)
    # torch.compile lays out the gradients that it is given as it guessed while it traced.
    assert_same_bits(laid_out(x_grad_NTCHW, channels_last=True), expected_grad_NTCHW)


@pytest.mark.gpu
def test_a_gpu_shifts_a_batch_beyond_32_bits() -> None:
    # 4 GiB.
    x_NTC = torch.zeros(2, 2, 2**29 + 2**10, dtype=torch.bfloat16, device="cuda")
    x_NTC[1, 1] = 1
    x_NTC[1, 0, -1] = 2
    out_NTC = temporal_shift(x_NTC, 2**19)
    assert shift_triton.plan_launch(x_NTC, 2**10, (1, -1)) is not None
    is_same = torch.equal(out_NTC, shift_by_slices(x_NTC, 2**10, (1, -1)))
    assert is_same

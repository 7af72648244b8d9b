"""The temporal shift compared with its definition as loops; gradients, memory layouts, and tracing."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tsm.shift import OFFSETS, Direction, check_fold_div, temporal_shift

DIRECTIONS: tuple[Direction, ...] = ("both", "past")


def by_definition(x_NTC: Tensor, fold_div: int, direction: Direction) -> Tensor:
    """Channel c of frame t comes from frame t + 1, t - 1 or t; zeros beyond the ends of a clip (TSM, section 3)."""
    out_NTC = torch.zeros_like(x_NTC)
    frames, channels = x_NTC.shape[1:3]
    fold = channels // fold_div
    for t in range(frames):
        for c in range(channels):
            if direction == "both":
                source = t + 1 if c < fold else t - 1 if c < 2 * fold else t
            else:
                source = t - 1 if c < fold else t
            if 0 <= source < frames:
                out_NTC[:, t, c] = x_NTC[:, source, c]
    return out_NTC


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tensor of distinct, nonzero elements."""
    return torch.arange(1, torch.Size(shape).numel() + 1, dtype=dtype).view(shape)


@given(
    n=st.integers(1, 3),
    t=st.integers(1, 5),
    c=st.integers(1, 20),
    fold_div=st.integers(2, 10),
    direction=st.sampled_from(DIRECTIONS),
    trailing=st.sampled_from([(), (2,), (2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60)
def test_it_is_the_definition(
    n: int, t: int, c: int, fold_div: int, direction: Direction, trailing: tuple[int, ...], dtype: torch.dtype
) -> None:
    x_NTC = numbered(n, t, c, *trailing, dtype=dtype)
    out_NTC = temporal_shift(x_NTC, fold_div, direction)
    assert out_NTC.dtype == dtype
    assert torch.equal(out_NTC, by_definition(x_NTC, fold_div, direction))


def test_reference_values() -> None:
    x_NTC = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 12.0]]])
    both = [[[5.0, 0.0, 3.0, 4.0], [9.0, 2.0, 7.0, 8.0], [0.0, 6.0, 11.0, 12.0]]]
    past = [[[0.0, 2.0, 3.0, 4.0], [1.0, 6.0, 7.0, 8.0], [5.0, 10.0, 11.0, 12.0]]]
    assert temporal_shift(x_NTC, 4, "both").tolist() == both
    assert temporal_shift(x_NTC, 4, "past").tolist() == past


def test_defaults_are_an_eighth_in_both_directions() -> None:
    x_NTC = numbered(1, 3, 16)
    assert torch.equal(temporal_shift(x_NTC), by_definition(x_NTC, 8, "both"))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_frame_loses_what_would_move(direction: Direction) -> None:
    moved = 2 if direction == "both" else 1
    out_NTC = temporal_shift(numbered(2, 1, 8), 8, direction)
    assert (out_NTC[:, :, :moved] == 0).all()
    assert torch.equal(out_NTC[:, :, moved:], numbered(2, 1, 8)[:, :, moved:])


def test_too_few_channels_for_a_fold_stay() -> None:
    assert torch.equal(temporal_shift(numbered(1, 3, 7), 8), numbered(1, 3, 7))


def test_the_input_is_left_alone() -> None:
    x_NTC = numbered(2, 4, 8)
    temporal_shift(x_NTC, 8)
    assert torch.equal(x_NTC, numbered(2, 4, 8))


# --- Memory layouts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_channels_last_frames_stay_channels_last(direction: Direction) -> None:
    frames_BCHW = numbered(6, 16, 3, 4).contiguous(memory_format=torch.channels_last)
    out_NTCHW = temporal_shift(frames_BCHW.unflatten(0, (2, 3)), 8, direction)
    assert out_NTCHW.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out_NTCHW, by_definition(numbered(2, 3, 16, 3, 4), 8, direction))


def test_contiguous_stays_contiguous() -> None:
    assert temporal_shift(numbered(2, 3, 16, 3, 4)).is_contiguous()


def test_a_view_with_gaps_gives_the_same_values() -> None:
    wide = numbered(2, 4, 16, 3, 10)
    view = wide[:, :, :, :, ::3]
    assert torch.equal(temporal_shift(view), by_definition(view.contiguous(), 8, "both"))


def test_the_gradient_keeps_channels_last() -> None:
    frames_BCHW = torch.randn(6, 16, 3, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    out_BCHW = temporal_shift(frames_BCHW.unflatten(0, (2, 3))).flatten(0, 1)
    out_BCHW.backward(torch.ones(6, 16, 3, 4).contiguous(memory_format=torch.channels_last))
    assert frames_BCHW.grad is not None
    assert frames_BCHW.grad.is_contiguous(memory_format=torch.channels_last)


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_of_first_and_second_order(direction: Direction) -> None:
    x_NTC = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)

    # Cubed, because all second derivatives of a linear map are zero.
    def cubed(x_NTC: Tensor) -> Tensor:
        return temporal_shift(x_NTC, 4, direction) ** 3

    assert torch.autograd.gradcheck(cubed, x_NTC)
    assert torch.autograd.gradgradcheck(cubed, x_NTC)


@given(t=st.integers(1, 6), c=st.integers(2, 12), fold_div=st.integers(2, 5), direction=st.sampled_from(DIRECTIONS))
@settings(max_examples=40)
def test_backward_is_the_adjoint(t: int, c: int, fold_div: int, direction: Direction) -> None:
    generator = torch.Generator().manual_seed(100 * t + c)
    x_NTC = torch.randn(2, t, c, dtype=torch.float64, generator=generator, requires_grad=True)
    y_NTC = torch.randn(2, t, c, dtype=torch.float64, generator=generator)
    out_NTC = temporal_shift(x_NTC, fold_div, direction)
    (adjoint_NTC,) = torch.autograd.grad((out_NTC * y_NTC).sum(), x_NTC, allow_unused=False)
    torch.testing.assert_close((x_NTC * adjoint_NTC).sum(), (out_NTC * y_NTC).sum(), rtol=1e-12, atol=1e-12)


def test_no_gradient_for_what_falls_off_an_end() -> None:
    x_NTC = torch.ones(1, 3, 8, requires_grad=True)
    temporal_shift(x_NTC, 8, "both").sum().backward()
    assert x_NTC.grad is not None
    expected_TC = torch.ones(3, 8)
    # Its value moved before the first frame.
    expected_TC[0, 0] = 0
    # Its value moved past the last frame.
    expected_TC[2, 1] = 0
    assert torch.equal(x_NTC.grad[0], expected_TC)


# --- torch.compile, torch.export and their operator for CUDA, which also takes CPU tensors ----------------------------


def by_operator(x_NTC: Tensor, fold_div: int = 8, direction: Direction = "both") -> Tensor:
    return torch.ops.tsm.temporal_shift(x_NTC, x_NTC.shape[2] // fold_div, OFFSETS[direction])


class Shifted(nn.Module):
    def __init__(self, shift: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x_NTC: Tensor) -> Tensor:
        return self.shift(x_NTC) * 2


SHIFTS = pytest.mark.parametrize("shift", [temporal_shift, by_operator])
# torch 2.11's Dynamo instantiates autograd functions, which makes torch warn.
DYNAMO = pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
)


@DYNAMO
@SHIFTS
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_traces_it_whole(shift: Callable[[Tensor], Tensor], backend: str) -> None:
    torch._dynamo.reset()
    x_NTC = torch.randn(2, 3, 16, requires_grad=True)
    grad_NTC = torch.randn(2, 3, 16)
    out_NTC = torch.compile(shift, fullgraph=True, backend=backend)(x_NTC)
    (x_grad_NTC,) = torch.autograd.grad(out_NTC, x_NTC, grad_NTC)
    assert torch.equal(out_NTC, temporal_shift(x_NTC))
    assert torch.equal(x_grad_NTC, torch.autograd.grad(temporal_shift(x_NTC), x_NTC, grad_NTC)[0])


@DYNAMO
@SHIFTS
@pytest.mark.parametrize("strict", [True, False])
def test_torch_export_traces_it_for_any_number_of_clips(shift: Callable[[Tensor], Tensor], strict: bool) -> None:
    sizes = {"x_NTC": {0: torch.export.Dim("n", min=1)}}
    program = torch.export.export(Shifted(shift), (torch.randn(2, 3, 16),), dynamic_shapes=sizes, strict=strict)
    x_NTC = torch.randn(5, 3, 16)
    assert torch.equal(program.module()(x_NTC), 2 * temporal_shift(x_NTC))
    has_operator = any(node.target is torch.ops.tsm.temporal_shift.default for node in program.graph.nodes)
    assert has_operator == (shift is by_operator)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_operator_has_the_same_gradients(direction: Direction) -> None:
    x_NTC = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.equal(by_operator(x_NTC, 4, direction), temporal_shift(x_NTC, 4, direction))
    assert torch.autograd.gradcheck(lambda x_NTC: by_operator(x_NTC, 4, direction) ** 3, x_NTC)
    assert torch.autograd.gradgradcheck(lambda x_NTC: by_operator(x_NTC, 4, direction) ** 3, x_NTC)


# torch's own checks access .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_operator_passes_the_checks_of_torch() -> None:
    x_NTCHW = (
        torch.randn(6, 16, 3, 4).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 3)).requires_grad_()
    )
    torch.library.opcheck(torch.ops.tsm.temporal_shift.default, (x_NTCHW, 2, [1, -1]))


@SHIFTS
def test_meta_tensors_have_the_right_layout(shift: Callable[[Tensor], Tensor]) -> None:
    x_NTCHW = torch.empty(6, 16, 3, 4, device="meta").contiguous(memory_format=torch.channels_last).unflatten(0, (2, 3))
    assert shift(x_NTCHW).stride() == x_NTCHW.stride()


@SHIFTS
def test_autocast_leaves_the_dtype_alone(shift: Callable[[Tensor], Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert shift(torch.randn(2, 3, 16)).dtype == torch.float32


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_a_tensor_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(N, T, C, \.\.\.\).*\(2, 3\)"):
        temporal_shift(torch.zeros(2, 3))


def test_an_unknown_direction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"direction.*'future'"):
        temporal_shift(torch.zeros(1, 2, 8), 8, "future")  # type: ignore[arg-type]


@pytest.mark.parametrize(("direction", "fold_div"), [("both", 1), ("both", 0), ("past", 0), ("past", -8)])
def test_folds_that_do_not_fit_are_refused(direction: Direction, fold_div: int) -> None:
    with pytest.raises(ValueError, match=f"fold_div.*got {fold_div}"):
        temporal_shift(torch.zeros(1, 2, 8), fold_div, direction)


@pytest.mark.parametrize(("direction", "least"), [("both", 2), ("past", 1)])
def test_the_least_fold_div_moves_every_channel(direction: Direction, least: int) -> None:
    assert check_fold_div(least, direction) == least
    x_NTC = numbered(1, 3, 8)
    out_NTC = temporal_shift(x_NTC, least, direction)
    assert torch.equal(out_NTC, by_definition(x_NTC, least, direction))
    assert not (out_NTC == x_NTC).any()

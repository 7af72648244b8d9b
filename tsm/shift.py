"""The temporal shift (Lin et al., TSM, arXiv:1811.08383, section 3): channels move along time, without multiplications."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from runtime.triton_launch import triton_can_launch

Direction = Literal["both", "past"]

# Fold i of frame t, the channels [i * fold, (i + 1) * fold), comes from frame t + offsets[i]. The other channels stay.
OFFSETS: dict[Direction, tuple[int, ...]] = {"both": (1, -1), "past": (-1,)}


def temporal_shift(x_NTCHW: Tensor, fold_div: int = 8, direction: Direction = "both") -> Tensor:
    """Shift `1 / fold_div` of the channels by one frame per direction, with zeros at the ends of the clip.

    With `fold = C // fold_div`:

    - `both` (offline): channels `[0, fold)` come from the next frame, `[fold, 2 * fold)` from the previous one;
    - `past` (online, uni-directional): channels `[0, fold)` come from the previous frame, so no frame needs a later one.

    The other channels stay. Accepts any memory layout and any shape after C; differentiable any number of times. `torch.compile`
    and `torch.export` trace it, on CUDA as the operator `torch.ops.tsm.temporal_shift`. On other devices `torch.export` sees
    slices, padding and one concatenation, which runtimes have.

    On CUDA with Triton, contiguous tensors and channels_last frames of floating-point dtypes use one kernel forward and one
    backward (`tsm.shift_triton`). All others use one copy per slice of channels, with bit-identical values.

    Raises ValueError for a tensor without N, T and C, an unknown direction, or folds that do not fit into the channels.
    """
    if x_NTCHW.dim() < 3:
        raise ValueError(f"temporal_shift needs a tensor (N, T, C, ...), got the shape {tuple(x_NTCHW.shape)}")
    fold = x_NTCHW.shape[2] // check_fold_div(fold_div, direction)
    if fold == 0:
        return x_NTCHW
    return _shift(x_NTCHW, fold, OFFSETS[direction])


def check_fold_div(fold_div: int, direction: Direction) -> int:
    """Return `fold_div`; raise ValueError if it is less than the number of folds that `direction` moves."""
    if direction not in ("both", "past"):
        raise ValueError(f"direction must be 'both' or 'past', got {direction!r}")
    folds = 2 if direction == "both" else 1
    if fold_div < folds:
        raise ValueError(f"fold_div must be {folds} or more for direction={direction!r}, got {fold_div}")
    return fold_div


def shift_by_slices(x_NTCHW: Tensor, fold: int, offsets: Sequence[int]) -> Tensor:
    """Return the shifted tensor in the memory layout of `x_NTCHW`, with one copy per slice of channels; not differentiable."""
    out_NTCHW = torch.empty_like(x_NTCHW)
    for number, offset in enumerate(offsets):
        channels = slice(number * fold, (number + 1) * fold)
        if offset > 0:
            out_NTCHW[:, :-1, channels] = x_NTCHW[:, 1:, channels]
            out_NTCHW[:, -1:, channels] = 0
        else:
            out_NTCHW[:, 1:, channels] = x_NTCHW[:, :-1, channels]
            out_NTCHW[:, :1, channels] = 0
    unmoved = len(offsets) * fold
    out_NTCHW[:, :, unmoved:] = x_NTCHW[:, :, unmoved:]
    return out_NTCHW


def shift_by_cat(x_NTCHW: Tensor, fold: int, offsets: Sequence[int]) -> Tensor:
    """Return the values of `shift_by_slices` from few operators, none of which writes into a part of a tensor.

    Exported to ONNX, each slice assignment becomes a ScatterND between transposes.
    """
    frame_dims = x_NTCHW.dim() - 2
    *fold_parts, staying_NTCHW = x_NTCHW.split([fold] * len(offsets) + [x_NTCHW.shape[2] - len(offsets) * fold], 2)
    parts = []
    for part_NTCHW, offset in zip(fold_parts, offsets, strict=True):
        kept_NTCHW, before_after = (part_NTCHW[:, 1:], (0, 1)) if offset > 0 else (part_NTCHW[:, :-1], (1, 0))
        parts.append(torch.nn.functional.pad(kept_NTCHW, (0, 0) * frame_dims + before_after))
    # Without a part that stays, an empty tensor would be one operator more.
    return torch.cat([*parts, staying_NTCHW] if staying_NTCHW.shape[2] > 0 else parts, 2)


@functools.cache
def _fused_shift() -> Callable[[Tensor, int, Sequence[int]], Tensor | None] | None:
    """Return `shift_triton.fused_shift`, or None if Triton is missing or cannot launch."""
    if not triton_can_launch():
        return None
    # Imported here, so that only processes with CUDA tensors pay the import cost of Triton.
    from . import shift_triton

    return shift_triton.fused_shift


def _shift_tensor(x_NTCHW: Tensor, fold: int, offsets: Sequence[int]) -> Tensor:
    fused_shift = _fused_shift() if x_NTCHW.is_cuda else None
    out_NTCHW = fused_shift(x_NTCHW, fold, offsets) if fused_shift else None
    return shift_by_slices(x_NTCHW, fold, offsets) if out_NTCHW is None else out_NTCHW


# --- Autograd ---------------------------------------------------------------------------------------------------------


def _shift(x_NTCHW: Tensor, fold: int, offsets: Sequence[int]) -> Tensor:
    # Only tracers need the operator, and only on CUDA; on other devices they can trace _Shift. Eager code skips the operator,
    # which saves about 15 us of host time per call.
    if x_NTCHW.is_cuda and _is_traced(x_NTCHW):
        shifted: Tensor = torch.ops.tsm.temporal_shift.default(x_NTCHW, fold, offsets)
    elif torch.compiler.is_exporting():
        shifted = shift_by_cat(x_NTCHW, fold, offsets)
    else:
        shifted = _Shift.apply(x_NTCHW, fold, offsets)
    return shifted


def _is_traced(x_NTCHW: Tensor) -> bool:
    """Return True under torch.compile, torch.export, FakeTensorMode or another dispatch mode, which must see the operator."""
    return (
        torch.compiler.is_compiling()
        or type(x_NTCHW) not in (Tensor, torch.nn.Parameter)
        or _get_current_dispatch_mode() is not None
    )


def _adjoint(offsets: Sequence[int]) -> tuple[int, ...]:
    """Return the gradient's offsets: each channel moves back, and frames shifted out of the clip get no gradient."""
    return tuple(-offset for offset in offsets)


class _Shift(torch.autograd.Function):
    """The shift as one autograd node: otherwise autograd would copy the whole gradient once per slice assignment."""

    @staticmethod
    def forward(ctx: Any, x_NTCHW: Tensor, fold: int, offsets: Sequence[int]) -> Tensor:
        ctx.fold, ctx.offsets = fold, offsets
        return _shift_tensor(x_NTCHW, fold, offsets)

    @staticmethod
    def backward(ctx: Any, grad_NTCHW: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _shift(grad_NTCHW, ctx.fold, _adjoint(ctx.offsets)), None, None


# --- The operator for tracers -----------------------------------------------------------------------------------------

OPERATOR = "tsm::temporal_shift"

torch.library.define(OPERATOR, "(Tensor x_NTCHW, int fold, int[] offsets) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(OPERATOR, "CompositeExplicitAutograd", _shift_tensor)


@torch.library.register_fake(OPERATOR)
def _shift_of_shapes(x_NTCHW: Tensor, fold: int, offsets: Sequence[int]) -> Tensor:
    return torch.empty_like(x_NTCHW)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, int, Sequence[int]], output: Tensor) -> None:
    _, ctx.fold, ctx.offsets = inputs


def _shift_gradient(ctx: Any, grad_NTCHW: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.tsm.temporal_shift.default(grad_NTCHW, ctx.fold, _adjoint(ctx.offsets)), None, None


torch.library.register_autograd(OPERATOR, _shift_gradient, setup_context=_keep_for_backward)

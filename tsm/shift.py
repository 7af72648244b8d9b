"""The temporal shift (Lin et al., TSM, arXiv:1811.08383, section 3): channels move along time, at no multiplication."""

from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["both", "past"]

# (first channel, end channel, frame offset): those channels of frame t come from frame t + offset.
Move = tuple[int, int, int]


def temporal_shift(x_NTCHW: Tensor, fold_div: int = 8, direction: Direction = "both") -> Tensor:
    """Move a `1 / fold_div` part of the channels by one frame, and leave zeros where the clip ends.

    With `fold = C // fold_div`:

    - `both` (offline): channels `[0, fold)` come from the next frame, `[fold, 2 * fold)` from the one before;
    - `past` (online, uni-directional): channels `[0, fold)` come from the frame before, so no frame needs a later one.

    The other channels stay. Takes any memory layout and any shape behind C; differentiable any number of times.

    Raises ValueError for a tensor without N, T and C, an unknown direction, or folds that do not fit into the channels.
    """
    if x_NTCHW.dim() < 3:
        raise ValueError(f"temporal_shift needs a tensor (N, T, C, ...), got the shape {tuple(x_NTCHW.shape)}")
    fold = x_NTCHW.shape[2] // check_fold_div(fold_div, direction)
    if fold == 0:
        return x_NTCHW
    moves = ((0, fold, 1), (fold, 2 * fold, -1)) if direction == "both" else ((0, fold, -1),)
    shifted: Tensor = _Shift.apply(x_NTCHW, moves)
    return shifted


def check_fold_div(fold_div: int, direction: Direction) -> int:
    """Return `fold_div` if that many folds leave room for those that `direction` moves, else raise ValueError."""
    if direction not in ("both", "past"):
        raise ValueError(f"direction must be 'both' or 'past', got {direction!r}")
    folds = 2 if direction == "both" else 1
    if fold_div < folds:
        raise ValueError(f"fold_div must be {folds} or more for direction={direction!r}, got {fold_div}")
    return fold_div


class _Shift(torch.autograd.Function):
    """The shift as a single node: autograd would otherwise copy the whole gradient once for each slice assignment."""

    @staticmethod
    def forward(ctx: Any, x_NTCHW: Tensor, moves: tuple[Move, ...]) -> Tensor:
        ctx.moves = moves
        out_NTCHW = torch.empty_like(x_NTCHW)
        for first, end, offset in moves:
            channels = slice(first, end)
            if offset > 0:
                out_NTCHW[:, :-1, channels] = x_NTCHW[:, 1:, channels]
                out_NTCHW[:, -1:, channels] = 0
            else:
                out_NTCHW[:, 1:, channels] = x_NTCHW[:, :-1, channels]
                out_NTCHW[:, :1, channels] = 0
        unmoved = moves[-1][1]
        out_NTCHW[:, :, unmoved:] = x_NTCHW[:, :, unmoved:]
        return out_NTCHW

    @staticmethod
    def backward(ctx: Any, grad_NTCHW: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # The adjoint sends each channel back where it came from; what fell off an end gets no gradient.
        return _Shift.apply(grad_NTCHW, tuple((first, end, -offset) for first, end, offset in ctx.moves)), None

"""The temporal shift as one Triton kernel: reads and writes every element once, 16 bytes at a time if the folds allow it.

`tsm.shift` imports this module at the first CUDA tensor, and only if Triton is installed.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The widest load and store of a GPU thread.
ACCESS_BYTES = 16
# Bytes that one program copies: 4 accesses by each of 4 x 32 threads.
BLOCK_BYTES = 8192
# Offsets within two neighbouring frames fit into 32 bits.
MAX_FRAME_ELEMENTS = 2**30
# Limit of a CUDA grid's first dimension.
MAX_PROGRAMS = 2**31 - 1

# Triton does not specialize the kernel on these arguments, so that all layers of a network share few kernels.
SIZES = ("frames", "frame_chunks", "row_chunks", "fold_chunks", "first_offset", "second_offset")


@triton.jit(do_not_specialize=SIZES)
def shift_kernel(
    x_ptr,
    out_ptr,
    frames,
    frame_chunks,
    row_chunks,
    fold_chunks,
    first_offset,
    second_offset,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy BLOCK chunks of one frame, each from the same frame or a neighbouring one; write zeros at the ends of the clip.

    A chunk is WIDTH adjacent elements in memory, all of one fold. `frames` is T. A frame has `frame_chunks` chunks: rows of
    `row_chunks`, each of which begins with two folds of `fold_chunks`.
    """
    frame_blocks = (frame_chunks + BLOCK - 1) // BLOCK
    frame = tl.program_id(0) // frame_blocks
    chunk_B = (tl.program_id(0) % frame_blocks) * BLOCK + tl.arange(0, BLOCK)
    row_chunk_B = chunk_B % row_chunks
    later_offset_B = tl.where(row_chunk_B < 2 * fold_chunks, second_offset, 0)
    offset_B = tl.where(row_chunk_B < fold_chunks, first_offset, later_offset_B)
    source_B = frame % frames + offset_B
    is_in_frame_B = chunk_B < frame_chunks
    is_in_clip_B = (source_B >= 0) & (source_B < frames)

    # A batch may have more than 2**31 elements, so the start of a frame needs 64 bits. The factor WIDTH comes last, so that
    # Triton's analysis finds each chunk aligned.
    frame_start = frame.to(tl.int64) * frame_chunks * WIDTH
    element_W = tl.arange(0, WIDTH)[None, :]
    to_BW = chunk_B[:, None] * WIDTH + element_W
    from_BW = (chunk_B + offset_B * frame_chunks)[:, None] * WIDTH + element_W
    value_BW = tl.load(x_ptr + frame_start + from_BW, mask=(is_in_frame_B & is_in_clip_B)[:, None], other=0.0)
    tl.store(out_ptr + frame_start + to_BW, value_BW, mask=is_in_frame_B[:, None])


class Launch(NamedTuple):
    """Launch arguments of `shift_kernel`: number of programs, sizes in the order of `SIZES`, and constants."""

    programs: int
    sizes: tuple[int, ...]
    width: int
    block: int


def plan_launch(x_NTCHW: Tensor, fold: int, offsets: Sequence[int]) -> Launch | None:
    """Return the launch arguments for `x_NTCHW` by its shape, strides and dtype, or None if the kernel does not support it.

    The kernel supports contiguous tensors and channels_last frames of `DTYPES`, with one or two `offsets`.
    """
    if x_NTCHW.dtype not in DTYPES:
        return None
    frames, channels = x_NTCHW.shape[1:3]
    frame_elements = x_NTCHW.shape[2:].numel()
    # Both layouts are rows that begin with the folds: a contiguous frame is one row, a channels_last frame is one row per pixel.
    if x_NTCHW.is_contiguous():
        row_elements, fold_elements = frame_elements, fold * (frame_elements // channels)
    elif x_NTCHW.movedim(2, -1).is_contiguous():
        row_elements, fold_elements = channels, fold
    else:
        return None
    # The largest power of two that divides the folds: a chunk across a boundary would come from two frames.
    width = math.gcd(row_elements, fold_elements, ACCESS_BYTES // x_NTCHW.element_size())
    block = BLOCK_BYTES // (width * x_NTCHW.element_size())
    frame_chunks = frame_elements // width
    programs = x_NTCHW.shape[:2].numel() * triton.cdiv(frame_chunks, block)
    if frame_elements > MAX_FRAME_ELEMENTS or programs > MAX_PROGRAMS:
        return None
    first_offset, second_offset = (*offsets, 0)[:2]
    sizes = (frames, frame_chunks, row_elements // width, fold_elements // width, first_offset, second_offset)
    return Launch(programs, sizes, width, block)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, fold: int, offsets: tuple[int, ...]
) -> Launch | None:
    """Cache `plan_launch`: a step has few different tensors, but asks in every layer, forward and backward."""
    return plan_launch(torch.empty_strided(shape, strides, dtype=dtype, device="meta"), fold, offsets)


def fused_shift(x_NTCHW: Tensor, fold: int, offsets: Sequence[int]) -> Tensor | None:
    """Return the result of `shift_by_slices`, bit-identical and in the same layout, or None if the kernel does not apply."""
    launch = _plan(x_NTCHW.shape, x_NTCHW.stride(), x_NTCHW.dtype, fold, tuple(offsets))
    if launch is None:
        return None
    out_NTCHW = torch.empty_like(x_NTCHW)
    if launch.programs > 0:
        with torch.cuda.device_of(x_NTCHW):
            shift_kernel[(launch.programs,)](x_NTCHW, out_NTCHW, *launch.sizes, WIDTH=launch.width, BLOCK=launch.block)
    return out_NTCHW

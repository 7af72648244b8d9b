"""Copies of tensors in host memory, in the layout of a safetensors file, so that writing the file needs no further copy.

Source of the format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, tensors end to end).
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_Layout = list[tuple[str, torch.dtype, torch.Size]]


class HostSnapshot:
    """A copy of named tensors; its memory is reused while names, dtypes and shapes stay the same."""

    def __init__(self) -> None:
        self._layout: _Layout | None = None

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors; they may change when this returns. The previous copy must not be in use any more."""
        # Large dtypes first, as in the safetensors library, so that every tensor is aligned to its dtype's size.
        ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        layout = [(name, tensor.dtype, tensor.shape) for name, tensor in ordered]
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if layout != self._layout:
            self._lay_out(layout, on_gpu)
        for view, (_, tensor) in zip(self._views, ordered, strict=True):
            # From a GPU, all copies are queued one after another, into pinned memory.
            view.copy_(tensor.detach(), non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()

    def parts(self) -> list[memoryview]:
        """Return the file's bytes in order: views of the copy, valid until the next `take`."""
        return [memoryview(self._header), self._body.numpy().data]

    def _lay_out(self, layout: _Layout, pinned: bool) -> None:
        entries, spans, end = {}, [], 0
        for name, dtype, shape in layout:
            begin, end = end, end + shape.numel() * dtype.itemsize
            entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            spans.append((begin, end))
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        self._body = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        self._views = [
            self._body[begin:end].view(dtype).view(shape)
            for (begin, end), (_, dtype, shape) in zip(spans, layout, strict=True)
        ]
        self._layout = layout

"""ExecuTorch programs on XNNPACK, for phones and small boards. They take one stream or clip at a time."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .check import Run
from .forms import Exportable, Files

_FILE = "model.pte"


def make_executorch(network: Exportable) -> Files:
    """Lower the float32 network."""
    return _lowered(network.program(batch=1))


def quantize_executorch(files: Files, network: Exportable, calls: Iterable[list[Tensor]]) -> Files:
    """Quantize by PT2E: 8-bit weights in a scale per channel, 8-bit activations with the ranges of these calls."""
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    module: Any = prepare_pt2e(network.program(batch=1).module(), quantizer)
    with torch.no_grad():
        for inputs in calls:
            module(*inputs)
    return _lowered(torch.export.export(convert_pt2e(module), tuple(network.zeros(1))))


def open_executorch(files: Files, network: Exportable) -> Run:
    """Load the program from memory."""
    from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer

    module = _load_for_executorch_from_buffer(files[_FILE])

    def run(inputs: list[Tensor]) -> list[Tensor]:
        # Outputs live in the program's memory, which the next call overwrites.
        return [output.clone() for output in module.forward([value.contiguous() for value in inputs])]

    return run


def _lowered(program: Any) -> Files:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    return {_FILE: bytes(edge.to_executorch().buffer)}

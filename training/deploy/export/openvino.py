"""OpenVINO models (an .xml file and the .bin of its weights), for Intel CPUs, GPUs and NPUs. Made from the ONNX files."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .check import Run
from .forms import Exportable, Files

_MODEL, _WEIGHTS = "model.xml", "model.bin"


def openvino_from_onnx(files: Files) -> Files:
    """Return the OpenVINO model of an ONNX file; int8 stays int8."""
    import openvino

    with tempfile.TemporaryDirectory() as temporary:
        model, weights = Path(temporary) / _MODEL, Path(temporary) / _WEIGHTS
        openvino.serialize(openvino.Core().read_model(files["model.onnx"]), model, weights)
        return {_MODEL: model.read_bytes(), _WEIGHTS: weights.read_bytes()}


def open_openvino(files: Files, network: Exportable, threads: int = 0) -> Run:
    """Compile the model for the CPU in float32; `threads`: 0 leaves their number to OpenVINO.

    Where the CPU has bfloat16 or float16 arithmetic, OpenVINO computes in it unless told otherwise.
    """
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(core.read_model(files[_MODEL], files[_WEIGHTS]), "CPU", options)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        named = dict(zip(network.inputs, (tensor.numpy() for tensor in inputs), strict=True))
        # Copies, so the next call does not overwrite them.
        results = compiled(named, share_inputs=False, share_outputs=False)
        return [torch.from_numpy(results[name]) for name in network.outputs]

    return run

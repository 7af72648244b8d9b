"""The file formats of exports: what each needs, how its files are made from a traced network, and how they are run.

Everything happens in memory, so nothing is written before a file has been run.
"""

import importlib.metadata
import io
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from training.errors import ConfigError

from .check import Run
from .executorch import make_executorch, open_executorch, quantize_executorch
from .forms import Exportable, Files
from .int8 import quantize_onnx
from .litert import make_litert, open_litert, quantize_litert
from .litert_packages import converter_versions
from .openvino import open_openvino, openvino_from_onnx

ONNX_OPSET = 20


@dataclass(frozen=True)
class Format:
    """How to make and run the files of one format."""

    make: Callable[[Exportable], Files]
    open: Callable[[Files, Exportable], Run]
    quantize: Callable[[Files, Exportable, Iterable[list[Tensor]]], Files] | None = None
    """Makes the int8 files from those of float32 and the inputs of calibration calls; None: there is no int8."""
    extra: str = ""
    """The extra of pyproject.toml that installs `packages`; empty: torch is enough."""
    packages: tuple[str, ...] = ()
    """What is imported, by the names to import."""
    batch: int | None = None
    """The only batch that its files take; None: any."""
    outside: Callable[[], dict[str, str]] = dict
    """Returns the versions of what makes the files outside this environment. Raises ConfigError if it is not there."""


def find_format(name: str) -> Format:
    """Return the format of this name. Raises ConfigError if it is unknown, or its packages are not installed."""
    if name not in FORMATS:
        raise ConfigError(f"format={name} is unknown. Fix: format={' or format='.join(FORMATS)}")
    found = FORMATS[name]
    missing = [package for package in found.packages if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"format={name} needs {', '.join(missing)}, which is not installed. "
            f"Fix: tools/setup_venv.sh .venv {found.extra} (the extra `{found.extra}`), or format=torch"
        )
    found.outside()
    return found


def versions_of(name: str) -> dict[str, str]:
    """Return the versions of the packages that made a file."""
    packages = ("torch", *FORMATS[name].packages)
    return {package: importlib.metadata.version(package) for package in packages} | FORMATS[name].outside()


# --- torch: a program of torch.export ---------------------------------------------------------------------------------


def _make_torch(network: Exportable) -> Files:
    file = io.BytesIO()
    torch.export.save(network.program(batch=None), file)
    return {"model.pt2": file.getvalue()}


def _open_torch(files: Files, network: Exportable) -> Run:
    module = torch.export.load(io.BytesIO(files["model.pt2"])).module()

    @torch.no_grad()
    def run(inputs: list[Tensor]) -> list[Tensor]:
        return list(module(*inputs))

    return run


# --- onnx: ONNX Runtime, TensorRT, onnxruntime-web --------------------------------------------------------------------


def _make_onnx(network: Exportable) -> Files:
    program = network.program(batch=None)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        # About torch's and onnxscript's own deprecated calls.
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            (),
            input_names=list(network.inputs),
            output_names=list(network.outputs),
            opset_version=ONNX_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    for value in (*model.graph.input, *model.graph.output):
        # torch names the dynamic dimension after a symbol of its tracer.
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    return {"model.onnx": model.SerializeToString()}


def _open_onnx(files: Files, network: Exportable) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(files["model.onnx"], providers=["CPUExecutionProvider"])

    def run(inputs: list[Tensor]) -> list[Tensor]:
        named = dict(zip(network.inputs, (tensor.numpy() for tensor in inputs), strict=True))
        return [torch.from_numpy(output) for output in session.run(list(network.outputs), named)]

    return run


# --- openvino ---------------------------------------------------------------------------------------------------------


def _make_openvino(network: Exportable) -> Files:
    return openvino_from_onnx(_make_onnx(network))


def _quantize_openvino(files: Files, network: Exportable, calls: Iterable[list[Tensor]]) -> Files:
    return openvino_from_onnx(quantize_onnx(_make_onnx(network), network, calls))


_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

FORMATS = {
    "onnx": Format(_make_onnx, _open_onnx, quantize_onnx, "onnx", _ONNX_PACKAGES),
    "torch": Format(_make_torch, _open_torch),
    "executorch": Format(
        make_executorch, open_executorch, quantize_executorch, "executorch", ("executorch", "torchao"), batch=1
    ),
    "openvino": Format(_make_openvino, open_openvino, _quantize_openvino, "openvino", (*_ONNX_PACKAGES, "openvino")),
    "litert": Format(
        make_litert,
        open_litert,
        quantize_litert,
        "litert",
        ("ai_edge_litert",),
        batch=1,
        outside=converter_versions,
    ),
}

"""LiteRT models (.tflite), for Android and other small devices. They take one stream or clip at a time.

The converter needs other versions of packages than this project. So it runs in a process of its own, with the packages that
tools/fetch_litert.py has installed into a folder outside the checkout.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.checkout import CHECKOUT

from .check import ExportError, Run
from .forms import Exportable, Files
from .litert_convert import MODEL, NAMES, PROGRAM
from .litert_packages import VERSION, packages_folder


def make_litert(network: Exportable) -> Files:
    """Convert the float32 network."""
    names = {
        "inputs": {name: [1, *shape] for name, shape in network.inputs.items()},
        "outputs": list(network.outputs),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.export.save(network.program(batch=1), folder / PROGRAM)
        (folder / NAMES).write_text(json.dumps(names))
        _run_converter("convert", folder)
        return {MODEL: (folder / MODEL).read_bytes()}


def quantize_litert(files: Files, network: Exportable, calls: Iterable[list[Tensor]]) -> Files:
    """Quantize to 8-bit weights, in a scale per channel, and 8-bit activations (MinMax). Ranges are those of these calls.

    Inputs and outputs, and so caches, stay float32.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / MODEL).write_bytes(files[MODEL])
        for number, call in enumerate(calls):
            named: dict[str, Any] = dict(zip(network.inputs, (tensor.numpy() for tensor in call), strict=True))
            np.savez(folder / f"call-{number:06}.npz", **named)
        _run_converter("quantize", folder)
        return {MODEL: (folder / MODEL).read_bytes()}


def open_litert(files: Files, network: Exportable, threads: int = 0) -> Run:
    """Load the model from memory. XNNPACK computes it, with `threads` threads; 0 leaves their number to LiteRT."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_content=files[MODEL], num_threads=threads or None).get_signature_runner()

    def run(inputs: list[Tensor]) -> list[Tensor]:
        named = dict(zip(network.inputs, (tensor.numpy() for tensor in inputs), strict=True))
        results = runner(**named)
        return [torch.from_numpy(results[name]) for name in network.outputs]

    return run


def _run_converter(command: str, folder: Path) -> None:
    """Run a command of litert_convert.py on the files in a folder. Raises ExportError if it fails."""
    # -P: no folder but these, so that the files here do not hide packages.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(packages_folder()), str(CHECKOUT)])}
    module = "training.deploy.export.litert_convert"
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, command, str(folder)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        reason = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise ExportError(f"litert-torch {VERSION} failed ({done.returncode}): {reason}. Fix: another format")

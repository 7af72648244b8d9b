"""Convert a traced program to a LiteRT model, or quantize one. `litert.py` runs this with the converter's own packages.

python -m training.deploy.export.litert_convert convert FOLDER      # model.pt2 and names.json in, model.tflite out
python -m training.deploy.export.litert_convert quantize FOLDER     # model.tflite and call-*.npz in, model.tflite out
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PROGRAM, NAMES, MODEL = "model.pt2", "names.json", "model.tflite"
# The name that the converter gives to a file's only signature.
SIGNATURE = "serving_default"


class Named(nn.Module):
    """A network that takes and returns tensors by name. The converter writes these names into the file."""

    def __init__(self, network: nn.Module, outputs: list[str]) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs
        # Programs of torch.export refuse eval(); theirs is fixed.
        self.training = False

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.outputs, self.network(*inputs.values()), strict=True))


def convert(folder: Path) -> None:
    """Convert the program in a folder."""
    import litert_torch

    names: dict[str, Any] = json.loads((folder / NAMES).read_text())
    network = Named(torch.export.load(folder / PROGRAM).module(), names["outputs"])
    inputs = {name: torch.zeros(shape) for name, shape in names["inputs"].items()}
    litert_torch.convert(network, sample_kwargs=inputs).export(str(folder / MODEL))


def quantize(folder: Path) -> None:
    """Quantize the model in a folder: 8-bit weights in a scale per channel, 8-bit activations with the ranges of the calls."""
    from ai_edge_quantizer import algorithm_manager, calibrator, qtyping, quantizer, recipe, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    model, rules = folder / MODEL, recipe_manager.RecipeManager()
    rules.load_quantization_recipe(recipe.static_wi8_ai8())
    for place in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        # Frames, caches and logits stay float32, as in the other formats.
        rules.add_quantization_config(".*", place, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE)
    # A list, because the calibrator goes through them twice.
    calls = [dict(np.load(path)) for path in sorted(folder.glob("call-*.npz"))]
    # By default ranges are moving averages, in which a stream's first frames, with caches of zeros, weigh most.
    ranges = calibrator.Calibrator(str(model), qsv_update_func=qsv_utils.min_max_update)
    ranges.calibrate({SIGNATURE: calls}, rules)
    result = quantizer.Quantizer(str(model), rules.get_quantization_recipe()).quantize(ranges.get_model_qsvs())
    model.write_bytes(bytes(result.quantized_model))


if __name__ == "__main__":
    {"convert": convert, "quantize": quantize}[sys.argv[1]](Path(sys.argv[2]))

"""The device of a rank: its name, its peak FLOP/s by the vendor's data sheet, and its peak memory so far."""

import platform
import re
import resource

import torch

from training.build.model import network_of
from training.config.schema import Config, NumericsConfig
from tsm.flops import clip_multiply_adds

_PEAKS = {
    "P100-SXM2": {"float32": 10.6},
    "P100-PCIE": {"float32": 9.3},
    "V100-SXM2": {"float32": 15.7, "float16": 125.0},
    "V100-SXM3": {"float32": 15.7, "float16": 125.0},
    "V100-PCIE": {"float32": 14.0, "float16": 112.0},
    "T4": {"float32": 8.1, "float16": 65.0},
    "A100": {"float32": 19.5, "tf32": 156.0, "float16": 312.0, "bfloat16": 312.0},
    "L40S": {"float32": 91.6, "tf32": 183.0, "float16": 362.0, "bfloat16": 362.0},
    "H100 PCIe": {"float32": 51.0, "tf32": 378.0, "float16": 756.0, "bfloat16": 756.0},
    "H100 80GB HBM3": {"float32": 67.0, "tf32": 494.7, "float16": 989.4, "bfloat16": 989.4},
    "H200": {"float32": 67.0, "tf32": 494.7, "float16": 989.4, "bfloat16": 989.4},
}
"""TFLOP/s without sparsity, by part of the device's name and precision, from NVIDIA's data sheets. Of other devices: unknown."""


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the machine's kind of processor."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return _cpu_model() or platform.machine()


def _cpu_model() -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), None)
    except OSError:
        return None


def precision_of(numerics: NumericsConfig) -> str:
    """Return the precision of convolutions and matrix products: that of autocast, or else tf32 if it is allowed, or the dtype."""
    if numerics.amp != "off":
        return numerics.amp
    return "tf32" if numerics.tf32 and numerics.dtype == "float32" else numerics.dtype


def peak_flops(name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a GPU at a precision; None if no data sheet is known.

    A GPU without TF32 computes in float32 where TF32 is allowed. A part of a GPU (MIG) is unknown.
    """
    if "MIG" in name.split():
        return None
    peaks = next((peaks for part, peaks in _PEAKS.items() if re.search(rf"\b{part}\b", name)), {})
    tflops = peaks.get(precision, peaks.get("float32") if precision == "tf32" else None)
    return None if tflops is None else tflops * 1e12


def peak_clips_per_s(config: Config, device: torch.device) -> float | None:
    """Return the clips/s at which a device would train at its peak FLOP/s; None if that is unknown, as on CPUs.

    Counts 3 forward passes per clip: a backward pass computes two gradients per multiplication. What it counts is the model's
    work, so recomputation, augmentation and the optimizer do not raise the utilisation.
    """
    peak = peak_flops(device_name(device), precision_of(config.numerics)) if device.type == "cuda" else None
    if peak is None:
        return None
    model, pipeline = config.model, config.pipeline
    flops = 6 * clip_multiply_adds(lambda: network_of(model, config.data.num_classes), pipeline.size)
    frames = model.num_frames + (pipeline.burn_in if pipeline.sampling == "stream" else 0)
    return peak / (flops * frames / model.num_frames)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory so far: of a GPU what torch's allocator had reserved, of a CPU the process' resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

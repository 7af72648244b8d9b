"""Facts of the machine, and the measured limits of its device, to which the report relates its figures."""

import ctypes
import os
import platform
import shutil
import struct
import sys
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from .processes import run
from .report import Results
from .timing import device_seconds

TOOLS = ("nvcc", "g++", "cmake", "mpicxx", "mpirun", "ffmpeg", "nvidia-smi", "ncu")
NVDEC = "libnvcuvid.so.1"
LIBRARIES = ("libcuda.so.1", "libcuda.so", "libnvidia-ml.so.1", NVDEC, "libnvidia-encode.so.1")
"""Driver libraries. libnvcuvid decodes video: without it DALI cannot decode on the GPU."""
PACKAGES = (
    "numpy", "torchvision", "triton", "hydra-core", "omegaconf", "av", "pyarrow", "safetensors", "timm", "torchmetrics", "mfusepy",
    "wandb", "torchcodec", "nvidia-dali-cuda130", "horovod", "mpi4py",
)  # fmt: skip
H264, CHROMA_420 = 4, 1
"""Values of cudaVideoCodec and cudaVideoChromaFormat."""
PRECISIONS = {"float32": False, "tf32": True, "float16": True, "bfloat16": True}
"""Precisions of matrix products, with the value of `allow_tf32`."""


def facts(results: Results) -> None:
    """Report software, driver and device, then the ceilings."""
    with results.row("software") as row:
        row |= {
            "python": sys.version, "glibc": platform.libc_ver()[1], "kernel": platform.release(),
            "cores": len(os.sched_getaffinity(0)), "memory_gib": _memory_gib(),
            "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
        row["tools"] = {tool: shutil.which(tool) for tool in TOOLS}
        row["libraries"] = {library: _loads(library) for library in LIBRARIES}
    if results.settings.device == "cuda":
        with results.row("device") as row:
            properties = torch.cuda.get_device_properties(0)
            row |= {
                "name": properties.name, "memory_gib": properties.total_memory / 2**30, "nccl": torch.cuda.nccl.version(),
                "multiprocessors": properties.multi_processor_count,
                "capability": torch.cuda.get_device_capability(),
            }  # fmt: skip
        ceilings(results)
        with results.row("NVDEC, H.264") as row:
            row |= nvdec()
    with results.row("packages") as row:
        row |= versions()
    with results.row("what the preflight sees") as row:
        code = "import json; from slurm.preflight.node import gpus; print(json.dumps(list(gpus(20))))"
        row["gpus"] = run([sys.executable, "-c", code], 25).output.strip()[-1500:]
    if shutil.which("nvidia-smi"):
        with results.row("nvidia-smi") as row:
            row["output"] = run(["nvidia-smi", "-q", "-d", "ECC,CLOCK,PERFORMANCE,ROW_REMAPPER"], 20).output


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _loads(library: str) -> str:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return "loads"


def nvdec() -> dict[str, int | str]:
    """Ask the driver's library whether this GPU decodes H.264 (4:2:0, 8 bits), with how many decoders, and up to which size."""
    if (found := _loads(NVDEC)) != "loads":
        return {"missing": found}
    torch.zeros(1, device="cuda")  # creates the CUDA context that the library needs
    capabilities = ctypes.create_string_buffer(256)  # CUVIDDECODECAPS has 88 bytes
    struct.pack_into("<III", capabilities, 0, H264, CHROMA_420, 0)
    code = ctypes.CDLL(NVDEC).cuvidGetDecoderCaps(capabilities)
    names = (
        "is_supported",
        "decoders",
        "output_formats",
        "max_width",
        "max_height",
        "max_macroblocks",
        "min_width",
        "min_height",
    )
    return {"cuda_error": code, **dict(zip(names, struct.unpack_from("<BBHIIIHH", capabilities, 24), strict=True))}


def versions() -> dict[str, str]:
    """Return the version of each package, and whether it is there at all; importing all of them takes a minute on a slow host."""
    found = dict.fromkeys(PACKAGES, "not installed")
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def ceilings(results: Results) -> None:
    """Measure copies within device memory and from the host, matrix products per precision, and the launch overhead."""
    tiny = results.settings.tiny
    elements, side, repeats = (1 << 20, 256, 2) if tiny else (1 << 30, 8192, 10)
    with results.row("copy") as row:
        x, y = torch.randn(elements, device="cuda"), torch.empty(elements, device="cuda")
        row["tb_s"] = 2 * x.nbytes / device_seconds(partial(y.copy_, x), repeats) / 1e12
    with results.row("host to device") as row:
        host = torch.empty(elements // 4, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device="cuda")
        row["gb_s"] = host.nbytes / device_seconds(partial(there.copy_, host, non_blocking=True), repeats) / 1e9
    for precision, tf32 in PRECISIONS.items():
        with results.row(f"matrix product, {precision}") as row:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
            a = torch.randn(side, side, device="cuda", dtype=dtype)
            b = torch.randn_like(a)
            row["tflop_s"] = 2 * side**3 / device_seconds(partial(torch.matmul, a, b), repeats) / 1e12
    with results.row("launch") as row:
        one = torch.zeros(1, device="cuda")
        launches = 20 * repeats if tiny else 20_000
        started_s = time.perf_counter()
        for _ in range(launches):
            one.add_(1)
        row["host_us"] = (time.perf_counter() - started_s) / launches * 1e6
        torch.cuda.synchronize()

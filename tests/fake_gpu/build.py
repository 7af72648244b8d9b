"""Builds the fake GPU and prints the folder of its two libraries: `python tests/fake_gpu/build.py`.

libfake_gpu.so is loaded before torch and stands in for the CUDA runtime, cuBLAS, cuDNN and NCCL; libcuda.so.1 stands in for
the driver. Every function of these that torch could call and that no source here defines is generated: it prints its name and
returns an error, so that nothing is passed over in silence.
"""

import contextlib
import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
PRELOADED = ("memory.c", "runtime.c", "libraries.c", "nccl.c", "calls.c")
FLAGS = ("-shared", "-fPIC", "-O2", "-std=gnu11", "-Wall", "-Werror", "-Wno-deprecated-declarations")
# The errors "not supported" of each API, for functions that are not implemented.
NOT_SUPPORTED = {"cuda": 801, "__cuda": 801, "cublas": 15, "cudnn": 3000, "nccl": 3, "cu": 801}


def site_folder(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"fake GPU: no package {package} here. Fix: make dev installs torch's CUDA build, which brings it"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def include_folders() -> list[Path]:
    """Headers from the wheels that torch's CUDA build needs; Triton's has those that the runtime's leaves out."""
    nvidia = site_folder("nvidia")
    found = [nvidia / "cu13/include", nvidia / "cudnn/include", nvidia / "nccl/include"]
    return [*found, site_folder("triton") / "backends/nvidia/include"]


def symbols(library: Path, which: str) -> set[str]:
    """A library's dynamic symbols, without their versions; `which` is nm's --undefined-only or --defined-only."""
    listed = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True)
    return {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}


def wanted_symbols() -> set[str]:
    """The functions of the CUDA libraries that torch's own libraries call."""
    libraries = sorted((site_folder("torch") / "lib").glob("lib*.so"))
    names = set().union(*(symbols(library, "--undefined-only") for library in libraries))
    return {name for name in names if re.match(r"__cuda|cuda[A-Z]|cublas|cudnn|nccl[A-Z]", name)}


def wanted_driver_symbols() -> set[str]:
    """The driver's functions that torch looks up by name."""
    library = (site_folder("torch") / "lib" / "libc10_cuda.so").read_bytes()
    return {name.decode() for name in re.findall(rb"\0(cu[A-Z][A-Za-z0-9]+)(?=\0)", library)}


def unimplemented_source(names: set[str]) -> str:
    """C code for functions that the sources here lack."""
    lines = ['#include "fake_gpu.h"']
    for name in sorted(names):
        error = next(error for prefix, error in NOT_SUPPORTED.items() if name.startswith(prefix))
        lines.append(f'int {name}(void) {{ return fake_gpu_unimplemented("{name}", {error}); }}')
    return "\n".join(lines) + "\n"


def key() -> str:
    """Names the build: the sources here and torch's version."""
    digest = hashlib.sha256()
    for path in [*sorted(HERE.glob("*.[ch]")), Path(__file__)]:
        digest.update(path.read_bytes())
    digest.update(str(site_folder("torch")).encode())
    digest.update((site_folder("torch") / "version.py").read_bytes())
    return digest.hexdigest()[:16]


def compile_library(target: Path, sources: list[Path], *options: str) -> None:
    """One shared library; what it does not define is found in the process that loads it."""
    includes = [f"-I{folder}" for folder in (HERE, target.parent / "include", *include_folders())]
    subprocess.run(["gcc", *FLAGS, *includes, "-o", str(target), *map(str, sources), *options], check=True)


def compile_into(folder: Path) -> None:
    """Both libraries. Each is linked twice: what it defines decides what has to be generated."""
    shim = folder / "include" / "nv" / "target"  # a C++ header that cuda_fp16.h asks for and that no wheel here has
    shim.parent.mkdir(parents=True)
    shim.touch()
    sources = [HERE / name for name in PRELOADED]
    preloaded = folder / "libfake_gpu.so"
    compile_library(preloaded, sources)
    generated = folder / "unimplemented.c"
    generated.write_text(unimplemented_source(wanted_symbols() - symbols(preloaded, "--defined-only")))
    compile_library(preloaded, [*sources, generated])
    driver = folder / "libcuda.so.1"
    compile_library(driver, [HERE / "driver.c"])
    there = {re.sub(r"_v\d$", "", name) for name in symbols(driver, "--defined-only")}
    generated.write_text(unimplemented_source(wanted_driver_symbols() - there))
    compile_library(driver, [HERE / "driver.c", generated], f"-Wl,-soname,{driver.name}")


def build() -> Path:
    """The folder of the two libraries, built unless it is there."""
    folder = CHECKOUT / "build" / f"fake_gpu-{key()}"
    if folder.exists():
        return folder
    missing = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"fake GPU: no {' and no '.join(missing)} here. Fix: apt-get install gcc binutils")
    folder.parent.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        compile_into(scratch)
        with contextlib.suppress(OSError):  # another process was faster
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


if __name__ == "__main__":
    print(build())

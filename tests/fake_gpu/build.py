"""Build the fake GPU and print the folder of its two libraries: `python tests/fake_gpu/build.py`.

libfake_gpu.so is preloaded before torch and replaces the CUDA runtime, cuBLAS, cuDNN and NCCL. libcuda.so.1 replaces
the driver. For every function that torch could call and that no source here defines, a stub is generated that prints
its name and returns an error, so that no call is ignored silently.
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
# Each API's "not supported" error, for functions that are not implemented.
NOT_SUPPORTED = {"cuda": 801, "__cuda": 801, "cublas": 15, "cudnn": 3000, "nccl": 3, "cu": 801}


def site_folder(package: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"fake GPU: no package {package} here. Fix: make dev installs torch's CUDA build, which brings it"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def include_folders() -> list[Path]:
    """Return header folders of the wheels of torch's CUDA build; Triton's wheel has headers that the runtime's lacks."""
    nvidia = site_folder("nvidia")
    found = [nvidia / "cu13/include", nvidia / "cudnn/include", nvidia / "nccl/include"]
    return [*found, site_folder("triton") / "backends/nvidia/include"]


def symbols(library: Path, which: str) -> set[str]:
    """Return a library's dynamic symbols without versions; `which` is nm's --undefined-only or --defined-only."""
    listed = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True)
    return {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}


def wanted_symbols() -> set[str]:
    """Return the functions of the CUDA libraries that torch's libraries call."""
    libraries = sorted((site_folder("torch") / "lib").glob("lib*.so"))
    names = set().union(*(symbols(library, "--undefined-only") for library in libraries))
    return {name for name in names if re.match(r"__cuda|cuda[A-Z]|cublas|cudnn|nccl[A-Z]", name)}


def wanted_driver_symbols() -> set[str]:
    """Return the driver's functions that torch looks up by name."""
    library = (site_folder("torch") / "lib" / "libc10_cuda.so").read_bytes()
    return {name.decode() for name in re.findall(rb"\0(cu[A-Z][A-Za-z0-9]+)(?=\0)", library)}


def unimplemented_source(names: set[str]) -> str:
    """Return C code of stubs for functions that the sources here lack."""
    lines = ['#include "fake_gpu.h"']
    for name in sorted(names):
        error = next(error for prefix, error in NOT_SUPPORTED.items() if name.startswith(prefix))
        lines.append(f'int {name}(void) {{ return fake_gpu_unimplemented("{name}", {error}); }}')
    return "\n".join(lines) + "\n"


def key() -> str:
    """Return the build's key, a hash of the sources here and of torch's version."""
    digest = hashlib.sha256()
    for path in [*sorted(HERE.glob("*.[ch]")), Path(__file__)]:
        digest.update(path.read_bytes())
    digest.update(str(site_folder("torch")).encode())
    digest.update((site_folder("torch") / "version.py").read_bytes())
    return digest.hexdigest()[:16]


def compile_library(target: Path, sources: list[Path], *options: str) -> None:
    """Compile one shared library; its undefined symbols are resolved in the process that loads it."""
    includes = [f"-I{folder}" for folder in (HERE, target.parent / "include", *include_folders())]
    subprocess.run(["gcc", *FLAGS, *includes, "-o", str(target), *map(str, sources), *options], check=True)


def compile_into(folder: Path) -> None:
    """Compile both libraries; each is linked twice, because its defined symbols decide which stubs to generate."""
    # A C++ header that cuda_fp16.h includes and that no installed wheel has.
    shim = folder / "include" / "nv" / "target"
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
    """Return the folder of the two libraries; build them if needed."""
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
        # Another process has built it meanwhile.
        with contextlib.suppress(OSError):
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


if __name__ == "__main__":
    print(build())

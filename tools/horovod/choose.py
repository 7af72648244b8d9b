"""Choose what Horovod is built with: C++ standard, compiler, CUDA, NCCL and MPI, each with its reason."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .commands import BuildError, first_line
from .recipe import HOROVOD_VERSION, recipe_hash


@dataclass(frozen=True)
class Torch:
    """The installed torch, read from its files: importing it takes seconds, and this runs on every `make horovod`."""

    version: str
    """With the local tag: 2.14.1+cu130."""
    cuda: str | None
    """CUDA version that it was built for, or None."""
    cxx11_abi: int
    folder: Path


@dataclass(frozen=True)
class Toolkit:
    """A source of the CUDA compiler and headers, or of NCCL."""

    kind: str
    """machine, wheels or none."""
    identity: str
    """Version, for the cache key."""
    root: Path | None
    """Folder with include and lib; None if pip packages are laid out at build time."""
    why: str
    """The reason, for the log."""


@dataclass(frozen=True)
class CacheKey:
    """Everything that the built binary depends on. Two equal keys may share a wheel."""

    horovod: str
    torch: str
    python_tag: str
    platform: str
    cxx11_abi: int
    cxx_standard: int
    compiler: str
    cpu_flags: str
    mpi: str
    cuda: str
    cuda_archs: str
    nccl: str
    recipe: str

    def digest(self) -> str:
        """Return the name of the cache folder, without a plus sign: Horovod's CMake files use paths as patterns."""
        text = json.dumps(asdict(self), sort_keys=True)
        torch = self.torch.replace("+", "-")
        return f"horovod-{self.horovod}-torch-{torch}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Plan:
    """All choices of one build."""

    key: CacheKey
    torch: Torch
    cuda: Toolkit
    nccl: Toolkit
    mpicxx: str | None


def cxx_standard(torch_version: str) -> int:
    """Return the C++ standard that torch's headers need: 14 before 2.1, 17 before 2.14, then 20."""
    match = re.match(r"(\d+)\.(\d+)", torch_version)
    if match is None:
        raise BuildError(f"cannot read torch's version {torch_version!r}")
    release = (int(match.group(1)), int(match.group(2)))
    if release < (2, 1):
        return 14
    return 17 if release < (2, 14) else 20


def default_cuda_archs(cuda_version: str) -> str:
    """Return the GPU generations to compile for: V100 (T4 with CUDA 13), A100, H100. Newer GPUs run the last one's PTX."""
    return "75,80,90" if int(cuda_version.split(".")[0]) >= 13 else "70,80,90"


def find_torch() -> Torch:
    """Describe the torch of this environment."""
    try:
        files = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        raise BuildError("torch is not installed here. Fix: make setup") from None
    folder = Path(str(files.locate_file("torch")))
    facts: dict[str, object] = {}
    exec((folder / "version.py").read_text(), facts)
    config = (folder / "share/cmake/Torch/TorchConfig.cmake").read_text()
    abi = re.search(r"_GLIBCXX_USE_CXX11_ABI=(\d)", config)
    cuda = facts.get("cuda")
    return Torch(str(facts["__version__"]), str(cuda) if cuda else None, int(abi.group(1)) if abi else 1, folder)


def toolkit_root(nvcc: str) -> Path | None:
    """Ask an nvcc for its toolkit's folder: the nvcc on PATH is often a wrapper or a link."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    match = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(match.group(1).strip()).resolve() if match else None


def switched_off(variable: str) -> bool:
    """Return whether an environment variable switches a part of the build off."""
    return os.environ.get(variable, "").lower() in {"off", "0", "none"}


def nvcc_candidates() -> Iterator[tuple[str, str]]:
    """Yield (reason, nvcc) in order of precedence."""
    for variable in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield f"{variable} names it", f"{os.environ[variable]}/bin/nvcc"
    on_path = shutil.which("nvcc")
    if on_path:
        yield "its nvcc is on PATH", on_path
    yield "the default place", "/usr/local/cuda/bin/nvcc"


def choose_cuda(torch: Torch) -> Toolkit:
    """Choose the machine's toolkit if its major version is torch's, else NVIDIA's compiler from pip, else none."""
    if torch.cuda is None:
        return Toolkit("none", "none", None, f"torch {torch.version} is built without CUDA")
    if switched_off("HOROVOD_CUDA"):
        return Toolkit("none", "none", None, "HOROVOD_CUDA asks for CPU only")
    wanted = torch.cuda.split(".")[0]
    passed_over = ""
    for why, nvcc in nvcc_candidates():
        root = toolkit_root(nvcc)
        if root is None:
            continue
        release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"release (\d+)\.\d+, V([\d.]+)", release)
        if match and match.group(1) == wanted:
            return Toolkit("machine", f"machine {match.group(2)}", root, f"{root}: {why}{passed_over}")
        found = match.group(2) if match else "of unknown version"
        passed_over += f"; passed over {root}, CUDA {found}, since torch {torch.version} needs CUDA {wanted}"
    if int(wanted) >= 13:
        version = importlib.metadata.version("cuda-toolkit")
        return Toolkit("wheels", f"wheels {version}", None, f"no nvcc on this machine{passed_over}: pip's, {version}")
    return Toolkit("none", "none", None, f"no nvcc of CUDA {wanted}, and pip has none{passed_over}; load a CUDA module")


def nccl_version(root: Path) -> str | None:
    """Read major.minor.patch from nccl.h; return None without such a header."""
    header = root / "include/nccl.h"
    if not header.is_file():
        return None
    text = header.read_text()
    parts = [re.search(rf"#define NCCL_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(part.group(1) for part in parts if part)


def choose_nccl(torch: Torch, cuda: Toolkit) -> Toolkit:
    """Choose the NCCL that the environment names, else torch's own, else the system's.

    Torch's comes before the system's: both have one library name in one process, and torch loads its own first.
    """
    if cuda.kind == "none":
        return Toolkit("none", "none", None, "no CUDA build, so no NCCL")
    named = [
        (name, Path(os.environ[name]))
        for name in ("HOROVOD_NCCL_HOME", "NCCL_HOME", "NCCL_ROOT")
        if os.environ.get(name)
    ]
    for name, root in named:
        version = nccl_version(root)
        if version is None:
            raise BuildError(f"{name}={root} holds no include/nccl.h. Fix: unset it or name a folder that does")
        return Toolkit("machine", f"machine {version}", root, f"{root}: {name} names it")
    wheel = torch.folder.parent / "nvidia/nccl"
    version = nccl_version(wheel)
    if version is not None:
        return Toolkit("wheels", f"wheels {version}", wheel, f"{version}, the one that torch brings and loads")
    for root in [*([cuda.root] if cuda.root else []), Path("/usr")]:
        version = nccl_version(root)
        if version is not None:
            return Toolkit("machine", f"machine {version}", root, f"{version} in {root}: torch brings none")
    raise BuildError(
        "a CUDA torch but no NCCL: neither beside torch nor in /usr/include.\n"
        "  Fix: set HOROVOD_NCCL_HOME to a folder with include/nccl.h, or HOROVOD_CUDA=off for a CPU build"
    )


def mpi_identity(mpicxx: str | None) -> str:
    """Return the implementation, version and flags of the compiler wrapper's MPI."""
    if mpicxx is None:
        return "none"
    version = first_line("mpirun", "--version") or first_line(mpicxx, "--showme:version") or "MPI of unknown version"
    flags = first_line(mpicxx, "-show")
    return f"{version}, flags {hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def cpu_flags() -> str:
    """List the instruction sets of this machine that Horovod's build uses if present."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    return ",".join(flag for flag in ("f16c", "avx", "fma") if flag in words)


def make_plan() -> Plan:
    """Inspect the machine and make all choices."""
    torch = find_torch()
    cuda = choose_cuda(torch)
    nccl = choose_nccl(torch, cuda)
    mpicxx = None if switched_off("HOROVOD_MPI") else shutil.which("mpicxx")
    compiler = first_line(os.environ.get("CXX") or shutil.which("c++") or "g++", "--version")
    if not compiler:
        raise BuildError("no C++ compiler. Fix: apt-get install g++ make")
    archs = os.environ.get("HOROVOD_BUILD_CUDA_CC_LIST") or default_cuda_archs(torch.cuda or "13")
    key = CacheKey(
        horovod=HOROVOD_VERSION,
        torch=torch.version,
        python_tag=f"{sys.implementation.cache_tag}{sys.abiflags}",
        platform=f"{sysconfig.get_platform()}-{'-'.join(platform.libc_ver())}",
        cxx11_abi=torch.cxx11_abi,
        cxx_standard=cxx_standard(torch.version),
        compiler=compiler,
        cpu_flags=cpu_flags(),
        mpi=mpi_identity(mpicxx),
        cuda=cuda.identity,
        cuda_archs=archs if cuda.kind != "none" else "none",
        nccl=nccl.identity,
        recipe=recipe_hash(),
    )
    return Plan(key, torch, cuda, nccl, mpicxx)


def explain(plan: Plan) -> None:
    """Print each choice and its reason."""
    mpi = (
        f"{plan.key.mpi}: {plan.mpicxx} is on PATH"
        if plan.mpicxx
        else "none: HOROVOD_MPI switches it off, or no mpicxx is on PATH (apt-get install libopenmpi-dev)"
    )
    print(f"horovod {HOROVOD_VERSION} for torch {plan.torch.version}, C++{plan.key.cxx_standard}, {plan.key.compiler}")
    print(f"  CUDA: {plan.cuda.kind}: {plan.cuda.why}")
    print(f"  NCCL: {plan.nccl.kind}: {plan.nccl.why}")
    print(f"  MPI:  {mpi}")
    print("  Gloo: always, it is part of Horovod's source", flush=True)

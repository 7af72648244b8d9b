"""Build, cache, install and prove Horovod for the torch that is installed beside it: `make horovod`.

    .venv/bin/python -m tools.build_horovod               # nothing to do: well under a second
    .venv/bin/python -m tools.build_horovod --explain     # say what would be chosen, and why
    .venv/bin/python -m tools.build_horovod --build-only  # fill the wheel cache, install nothing

Horovod's last release (2023) compiles against today's torch only with a newer C++ standard, and against a CUDA torch
only where it finds a CUDA toolkit. This script edits the first and finds or lays out the second. In order:

1. choose   CUDA, NCCL, MPI, C++ standard: the machine's where it has them, else what pip packages hold, else CPU only
2. look up  the wheel cache, keyed by everything that the binary depends on
3. build    in a folder aside; only a finished wheel is renamed into the cache, so an interrupted build leaves nothing
4. install  into the environment of the Python that runs this
5. prove    two processes and one all-reduce over Gloo, and over MPI where MPI was built in

What an operator can set (load the site's CUDA and MPI modules first):
    HOROVOD_CUDA_HOME or CUDA_HOME              a CUDA toolkit
    HOROVOD_NCCL_HOME, NCCL_HOME or NCCL_ROOT   an NCCL other than torch's
    HOROVOD_CUDA=off                            CPU only
    HOROVOD_MPI=off                             without MPI, for machines that have none
    HOROVOD_BUILD_CUDA_CC_LIST                  GPU generations, as in 70,80,90
    JOBS                                        parallel compilers
"""

import argparse
import fcntl
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
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.requirements import name_of, requirements

ROOT = Path(__file__).resolve().parent.parent
HOROVOD_VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"

# (file in the source, text that must be there, replacement). {cxx} is the C++ standard that torch needs.
SOURCE_EDITS = (
    ("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD {cxx})"),
    ("horovod/torch/CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD {cxx})"),
    # Horovod's own kernels are plain C++11, but the newest nvcc's headers are not.
    ("horovod/common/ops/cuda/CMakeLists.txt", "set(CMAKE_CUDA_STANDARD 11)", "set(CMAKE_CUDA_STANDARD 17)"),
    # The driver installs libcuda.so.1. The plain name is a development link, which compute nodes and containers often lack:
    # without it every reduction ends with "Could not dlopen libcuda.so".
    ("horovod/torch/cuda_util.cc", 'dlopen("libcuda.so", RTLD_LAZY)', 'dlopen("libcuda.so.1", RTLD_LAZY)'),
)
# CPU only beside a CUDA torch: otherwise any nvcc in sight switches the CUDA build on again.
CPU_ONLY_EDIT = ("cmake/Modules/FindPytorch.cmake", "(CUDA_HOME is not None)", "False")

BUILD_SETTINGS = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_GLOO": "1",
    "CMAKE_GENERATOR": "Unix Makefiles",  # setup.py passes make's flags
    "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # Gloo's CMakeLists.txt asks for 2.8, which CMake 4 refuses
}

# Text in a failed build's log, and what mends it. The first that fits is printed.
LIKELY_FIXES = (
    (r"Python\.h: No such file", "install Python's headers: apt-get install python3.11-dev"),
    (r"No CMAKE_CXX_COMPILER|c\+\+: not found|g\+\+: not found", "install a C++ compiler: apt-get install g++"),
    (
        r"Could NOT find MPI",
        "the MPI compiler wrapper is there but unusable: apt-get install libopenmpi-dev openmpi-bin",
    ),
    (r"Could NOT find NCCL", "name a folder that holds include/nccl.h and lib/libnccl.so* in HOROVOD_NCCL_HOME"),
    (r"unsupported GNU version", "nvcc is older than the compiler: set CXX and CUDAHOSTCXX to an older g++"),
    (r"C\+\+\d+ (or later )?compatible compiler|unrecognized .*-std=", "the compiler is too old for torch: set CXX"),
    (
        r"cannot find -lcuda|CUDAToolkit.*(missing|NOTFOUND)|Could NOT find CUDAToolkit",
        "point CUDA_HOME at a whole toolkit",
    ),
    (r"Killed signal|out of memory|Killed", "a compiler ran out of memory: JOBS=1 make horovod"),
    (r"No space left on device", "make room, or set XDG_CACHE_HOME to a larger disk"),
    (
        r"Could not find a version|Connection|Temporary failure in name resolution",
        "pip could not reach its package index",
    ),
)


class BuildError(Exception):
    """Something that the person at the keyboard can mend; its text says how."""


# --- What is chosen ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Torch:
    """The installed torch, read from its files: importing it takes seconds, and this runs on every `make horovod`."""

    version: str
    """With the local tag: 2.14.1+cu130."""
    cuda: str | None
    """Version of CUDA it was built for, or None."""
    cxx11_abi: int
    folder: Path


@dataclass(frozen=True)
class Toolkit:
    """Where the CUDA compiler and headers, or NCCL, come from."""

    kind: str
    """machine, wheels or none."""
    identity: str
    """Version, for the cache key."""
    root: Path | None
    """Folder with include and lib; None where pip packages are laid out at build time."""
    why: str
    """For the person who reads the log."""


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
        """Short name for the cache's folder, without a plus sign: Horovod's CMake files use paths as patterns."""
        text = json.dumps(asdict(self), sort_keys=True)
        torch = self.torch.replace("+", "-")
        return f"horovod-{self.horovod}-torch-{torch}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Plan:
    """One build, decided."""

    key: CacheKey
    torch: Torch
    cuda: Toolkit
    nccl: Toolkit
    mpicxx: str | None


def cxx_standard(torch_version: str) -> int:
    """The C++ standard that torch's headers need: 14 before 2.1, 17 before 2.14, then 20."""
    match = re.match(r"(\d+)\.(\d+)", torch_version)
    if match is None:
        raise BuildError(f"cannot read torch's version {torch_version!r}")
    release = (int(match.group(1)), int(match.group(2)))
    if release < (2, 1):
        return 14
    return 17 if release < (2, 14) else 20


def default_cuda_archs(cuda_version: str) -> str:
    """GPU generations to compile for: V100 (not with CUDA 13) or T4, A100, H100; newer ones run the last one's PTX."""
    return "75,80,90" if int(cuda_version.split(".")[0]) >= 13 else "70,80,90"


def recipe_hash() -> str:
    """Changes with every setting of this script that changes the binary."""
    text = repr((SDIST_SHA256, SOURCE_EDITS, CPU_ONLY_EDIT, sorted(BUILD_SETTINGS.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_line(*command: str | Path) -> str:
    """First line that a command prints, or "" where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return next(iter((done.stdout.strip() or done.stderr.strip()).splitlines()), "")


def find_torch() -> Torch:
    """The torch of this environment."""
    try:
        files = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        raise BuildError("torch is not installed here; fix: make setup") from None
    folder = Path(str(files.locate_file("torch")))
    facts: dict[str, object] = {}
    exec((folder / "version.py").read_text(), facts)
    config = (folder / "share/cmake/Torch/TorchConfig.cmake").read_text()
    abi = re.search(r"_GLIBCXX_USE_CXX11_ABI=(\d)", config)
    cuda = facts.get("cuda")
    return Torch(str(facts["__version__"]), str(cuda) if cuda else None, int(abi.group(1)) if abi else 1, folder)


def nvidia_folders(torch: Torch) -> list[Path]:
    """Folders of torch's CUDA packages that hold headers (one for CUDA 13, many for CUDA 12), NCCL's left out."""
    return sorted(
        include.parent for include in torch.folder.parent.glob("nvidia/*/include") if include.parent.name != "nccl"
    )


def toolkit_root(nvcc: str) -> Path | None:
    """The toolkit that an nvcc belongs to, as nvcc itself says: the one on PATH is often a wrapper or a link."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    match = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(match.group(1).strip()).resolve() if match else None


def switched_off(variable: str) -> bool:
    """Whether the operator asked to build without something."""
    return os.environ.get(variable, "").lower() in {"off", "0", "none"}


def nvcc_candidates() -> Iterator[tuple[str, str]]:
    """(why, nvcc) in order of precedence."""
    for variable in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield f"{variable} names it", f"{os.environ[variable]}/bin/nvcc"
    on_path = shutil.which("nvcc")
    if on_path:
        yield "its nvcc is on PATH", on_path
    yield "the usual place", "/usr/local/cuda/bin/nvcc"


def choose_cuda(torch: Torch) -> Toolkit:
    """The machine's toolkit of torch's CUDA generation, else NVIDIA's compiler from pip, else none."""
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
    """major.minor.patch from nccl.h, or None where there is no such header."""
    header = root / "include/nccl.h"
    if not header.is_file():
        return None
    text = header.read_text()
    parts = [re.search(rf"#define NCCL_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(part.group(1) for part in parts if part)


def choose_nccl(torch: Torch, cuda: Toolkit) -> Toolkit:
    """One that the operator names; else torch's own; else the system's.

    Torch's comes before the system's: both live in one process under one library name, and torch loads its own first.
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
            raise BuildError(f"{name}={root} holds no include/nccl.h; unset it or name a folder that does")
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
        "  fix: set HOROVOD_NCCL_HOME to a folder with include/nccl.h, or HOROVOD_CUDA=off for a CPU build"
    )


def mpi_identity(mpicxx: str | None) -> str:
    """Implementation, version and flags of the MPI that the compiler wrapper stands for."""
    if mpicxx is None:
        return "none"
    version = first_line("mpirun", "--version") or first_line(mpicxx, "--showme:version") or "MPI of unknown version"
    flags = first_line(mpicxx, "-show")
    return f"{version}, flags {hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def cpu_flags() -> str:
    """Instruction sets that Horovod compiles for where the building machine has them."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    return ",".join(flag for flag in ("f16c", "avx", "fma") if flag in words)


def make_plan() -> Plan:
    """Look at the machine and decide."""
    torch = find_torch()
    cuda = choose_cuda(torch)
    nccl = choose_nccl(torch, cuda)
    mpicxx = None if switched_off("HOROVOD_MPI") else shutil.which("mpicxx")
    compiler = first_line(os.environ.get("CXX") or shutil.which("c++") or "g++", "--version")
    if not compiler:
        raise BuildError("no C++ compiler; fix: apt-get install g++ make")
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
    """What was chosen, and why."""
    mpi = (
        f"{plan.key.mpi}: {plan.mpicxx} is on PATH"
        if plan.mpicxx
        else "none: HOROVOD_MPI asks for that, or no mpicxx is on PATH (apt-get install libopenmpi-dev)"
    )
    print(f"horovod {HOROVOD_VERSION} for torch {plan.torch.version}, C++{plan.key.cxx_standard}, {plan.key.compiler}")
    print(f"  CUDA: {plan.cuda.kind}: {plan.cuda.why}")
    print(f"  NCCL: {plan.nccl.kind}: {plan.nccl.why}")
    print(f"  MPI:  {mpi}")
    print("  Gloo: always, it is part of Horovod's source", flush=True)


# --- Build ------------------------------------------------------------------------------------------------------------


def link_missing(sources: Sequence[Path], target: Path) -> None:
    """Link every entry of the source folders into target; the first source that has a name wins."""
    target.mkdir(parents=True, exist_ok=True)
    for source in sources:
        for entry in sorted(source.iterdir()) if source.is_dir() else []:
            link = target / entry.name
            if not link.is_symlink():
                link.symlink_to(entry.resolve())


def add_plain_names(folder: Path) -> None:
    """libcudart.so beside libcudart.so.13: pip packages hold versioned names, and linkers want the plain one."""
    for library in sorted(folder.glob("lib*.so.*")):
        plain = folder / f"{library.name.split('.so.')[0]}.so"
        if not plain.is_symlink():
            plain.symlink_to(library.name)


def lay_out_cuda(roots: Sequence[Path], folder: Path) -> Path:
    """One toolkit folder by links out of several half ones: the programs of the first, headers and libraries of all."""
    link_missing([root / "include" for root in roots], folder / "include")
    link_missing([root / lib for root in roots for lib in ("lib64", "lib")], folder / "lib64")
    add_plain_names(folder / "lib64")
    (folder / "lib").symlink_to("lib64")
    (folder / "nvvm").symlink_to(roots[0] / "nvvm")
    # A copy: nvcc finds everything else by bin/.., which through a link would lead back into the half toolkit.
    shutil.copytree(roots[0] / "bin", folder / "bin")
    # nvcc looks for its own headers and libraries here.
    target = folder / "targets" / ("sbsa-linux" if platform.machine() == "aarch64" else f"{platform.machine()}-linux")
    target.mkdir(parents=True)
    for name, to in (("include", "include"), ("lib", "lib64")):
        (target / name).symlink_to(folder / to)
    return folder


def cuda_home(plan: Plan, work: Path, log: Path) -> Path:
    """The toolkit folder to build with: the machine's if it is whole, else one laid out in the work folder."""
    root = plan.cuda.root
    if root is not None and (root / "include/cublas_v2.h").is_file() and (root / "lib64/libcudart.so").exists():
        return root
    if root is None:
        version = importlib.metadata.version("cuda-toolkit")
        fetched = work / "nvcc"
        run_logged([*pip("install"), "--target", fetched, f"cuda-toolkit[nvcc,cccl]=={version}"], log, dict(os.environ))
        root = next(fetched.glob("nvidia/cu*/bin/nvcc")).parent.parent
    return lay_out_cuda([root, *nvidia_folders(plan.torch)], work / "cuda")


def nccl_home(plan: Plan, work: Path) -> Path:
    """The NCCL folder to build with, with a plain libnccl.so for torch's copy."""
    assert plan.nccl.root is not None
    if plan.nccl.kind == "machine":
        return plan.nccl.root
    folder = work / "nccl"
    link_missing([plan.nccl.root / "include"], folder / "include")
    link_missing([plan.nccl.root / "lib"], folder / "lib")
    add_plain_names(folder / "lib")
    return folder


def jobs() -> int:
    """Parallel compilers: one a core, but each takes up to 2 GiB, and login nodes have many cores."""
    if os.environ.get("JOBS"):
        return max(1, int(os.environ["JOBS"]))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory_gib / 2), 16))


def build_environment(plan: Plan, work: Path, log: Path) -> dict[str, str]:
    """The environment of the build: nothing that a make or a shell left in HOROVOD_* or MAKEFLAGS may leak into it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHONPATH", "PYTHONWARNINGS"):
        kept.pop(name, None)
    scripts = sysconfig.get_path("scripts")
    environment = (
        kept
        | BUILD_SETTINGS
        | {
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "HOROVOD_CMAKE": f"{scripts}/cmake",
            "MAKEFLAGS": f"-j{jobs()}",
        }
    )
    environment["HOROVOD_WITH_MPI" if plan.mpicxx else "HOROVOD_WITHOUT_MPI"] = "1"
    if plan.cuda.kind != "none":
        home = str(cuda_home(plan, work, log))
        environment |= {"CUDA_HOME": home, "CUDAToolkit_ROOT": home, "HOROVOD_CUDA_HOME": home}
        environment |= {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_BUILD_CUDA_CC_LIST": plan.key.cuda_archs,
            "HOROVOD_NCCL_HOME": str(nccl_home(plan, work)),
        }
        if plan.nccl.kind == "wheels":
            environment["HOROVOD_NCCL_LINK"] = "SHARED"
    return environment


def edit_source(source: Path, plan: Plan) -> None:
    """Make the source fit today's torch. A text that is not where it was is an error: this is another release."""
    edits = [*SOURCE_EDITS, *([CPU_ONLY_EDIT] if plan.cuda.kind == "none" else [])]
    for name, old, new in edits:
        path = source / name
        text = path.read_text()
        if old not in text:
            raise BuildError(
                f"{name} of Horovod's source does not hold {old!r}; this script knows {HOROVOD_VERSION} only"
            )
        path.write_text(text.replace(old, new.format(cxx=plan.key.cxx_standard)))


def pip(*command: str) -> list[str | Path]:
    """pip of this environment, quiet about itself."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *command]


def run_logged(command: Sequence[str | Path], log: Path, environment: dict[str, str], cwd: Path | None = None) -> None:
    """Run a command with all that it says in the log; on failure the log's end and the likely fix are the error."""
    with log.open("a") as out:
        print("$", *command, file=out, flush=True)
        done = subprocess.run(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=cwd,
            check=False,
        )
    if done.returncode:
        raise BuildError(failure_text(log, f"{Path(command[0]).name} failed with status {done.returncode}"))


def failure_text(log: Path, what: str) -> str:
    """The end of the log, where the log is, and the likely fix."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.search(r"\berror\b|CMake Error", line, re.IGNORECASE)]
    shown = "\n".join(f"  | {line[:200]}" for line in [*errors[:5], "...", *lines[-15:]])
    text = "\n".join(lines)
    fix = next((fix for pattern, fix in LIKELY_FIXES if re.search(pattern, text)), "read the first error in the log")
    return f"{what}\n{shown}\n  log: {log}\n  likely fix: {fix}"


def fetch_source(work: Path, log: Path) -> Path:
    """The release's source, checked against the digest that this script was written for."""
    command = [*pip("download"), "--no-deps", "--no-binary", "horovod", "--no-build-isolation", "--dest", work]
    run_logged([*command, f"horovod=={HOROVOD_VERSION}"], log, dict(os.environ))
    sdist = next(work.glob("horovod-*.tar.gz"))
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise BuildError(f"{sdist.name} has sha256 {digest}, expected {SDIST_SHA256}: not the published release")
    shutil.unpack_archive(sdist, work)
    return work / f"horovod-{HOROVOD_VERSION}"


def cache_root() -> Path:
    """Outside the clone, so that every clone and every environment shares it."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tsm-at-scale" / "wheels"
    if re.search(r"[^\w./-]", str(root)):
        # Seen: with a plus sign in the path the compiled library lands outside the wheel, and the build still succeeds.
        raise BuildError(f"Horovod cannot be built in {root}: set XDG_CACHE_HOME to a path of plain letters and digits")
    return root


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One at a time: a second build of a key waits and then finds the wheel, a second install finds it installed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached_wheel(folder: Path) -> Path | None:
    """The finished wheel of a cache folder, if there is one."""
    return next(iter(sorted(folder.glob("horovod-*.whl"))), None)


def check_wheel(wheel: Path, log: Path) -> None:
    """Horovod's setup.py can succeed without its compiled part: such a wheel must not reach the cache."""
    with zipfile.ZipFile(wheel) as archive:
        if not any(re.fullmatch(r"horovod/torch/mpi_lib_v2\S*\.so", name) for name in archive.namelist()):
            raise BuildError(failure_text(log, f"{wheel.name} holds no compiled horovod/torch/mpi_lib_v2"))


def build_wheel(plan: Plan, folder: Path) -> Path:
    """Compile, then rename the wheel into the cache folder. The log stays beside it."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a build that was killed
    work.mkdir(parents=True)
    log = folder / "build.log"
    log.unlink(missing_ok=True)
    print(f"  building with {jobs()} compilers, some minutes; log: {log}", flush=True)
    start_s = time.monotonic()
    try:
        install_build_requirements(log)
        source = fetch_source(work, log)
        edit_source(source, plan)
        environment = build_environment(plan, work, log)
        command = [*pip("wheel"), "--verbose", "--no-build-isolation", "--no-deps", "--wheel-dir", work / "wheel", "."]
        run_logged(command, log, environment, cwd=source)
        built = next((work / "wheel").glob("horovod-*.whl"))
        check_wheel(built, log)
        (folder / "key.json").write_text(json.dumps(asdict(plan.key), indent=2) + "\n")
        wheel = folder / built.name
        built.replace(wheel)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"  built in {(time.monotonic() - start_s) / 60:.1f} minutes: {wheel}", flush=True)
    return wheel


def wheel_for(plan: Plan) -> Path:
    """From the cache, else built."""
    folder = cache_root() / plan.key.digest()
    with locked(folder.with_name(f"{folder.name}.lock")):
        wheel = cached_wheel(folder)
        if wheel is not None:
            print(f"  from the cache: {wheel}", flush=True)
            return wheel
        return build_wheel(plan, folder)


# --- Install and prove ------------------------------------------------------------------------------------------------


def pinned(*groups: str) -> list[str]:
    """Requirements of the groups, without Horovod itself."""
    return [line for line in requirements(list(groups)) if name_of(line) != "horovod"]


def install_build_requirements(log: Path) -> None:
    """CMake and the like, in the pinned versions."""
    command = [*pip("install"), "--constraint", ROOT / "constraints.txt", *pinned("horovod-build")]
    run_logged(command, log, dict(os.environ))


def install(wheel: Path) -> None:
    """The wheel without its dependencies (they would bring their own versions), then those, pinned."""
    needed = [*pip("install"), "--quiet", "--constraint", ROOT / "constraints.txt", *pinned("horovod")]
    for command in (needed, [*pip("install"), "--quiet", "--no-deps", "--force-reinstall", wheel]):
        if subprocess.run(command, check=False).returncode:
            raise BuildError(f"pip could not install into {sys.prefix}; the wheel is whole: {wheel}")


def stamp_of(key: CacheKey) -> Path:
    """A file in the environment that says: the Horovod here is this one, and it was proven."""
    return Path(sys.prefix) / f".{key.digest()}"


def up_to_date(key: CacheKey) -> bool:
    """Is the proven Horovod of this key still the one that is installed?"""
    stamp = stamp_of(key)
    if not stamp.is_file():
        return False
    try:
        metadata = importlib.metadata.distribution("horovod")
    except importlib.metadata.PackageNotFoundError:
        return False
    installed = Path(str(metadata.locate_file(f"horovod-{HOROVOD_VERSION}.dist-info/RECORD")))
    return installed.is_file() and installed.stat().st_mtime <= stamp.stat().st_mtime


def mpirun_command(processes: int) -> tuple[list[str], dict[str, str]] | None:
    """(command, environment) that starts processes on this machine, or None where there is no mpirun."""
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        return None
    environment = dict(os.environ)
    flags: list[str] = []
    if re.search(r"open[ -]?mpi|openrte|prte", first_line(mpirun, "--version"), re.IGNORECASE):
        flags = ["--oversubscribe", "--bind-to", "none"]
        if os.geteuid() == 0:
            for prefix in ("OMPI", "PRTE"):
                environment |= {f"{prefix}_ALLOW_RUN_AS_ROOT": "1", f"{prefix}_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [mpirun, *flags, "-np", str(processes)], environment


def run_proof(launcher: list[str], environment: dict[str, str], processes: int, controller: str) -> dict[str, object]:
    """Start tools/prove_horovod.py under a launcher; its facts, once they are checked."""
    program = [*launcher, sys.executable, str(ROOT / "tools/prove_horovod.py")]
    try:
        done = subprocess.run(
            program, env=environment, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(
            f"{controller}: {processes} processes did not finish an all-reduce in 180 s: {error.output}"
        ) from None
    match = re.search(r"PROOF (\{.*\})", done.stdout)
    if done.returncode or match is None:
        raise BuildError(f"{' '.join(program)}\nfailed with status {done.returncode}:\n{done.stdout}{done.stderr}")
    facts: dict[str, object] = json.loads(match.group(1))
    expected = {"size": processes, "sum": processes * (processes + 1) / 2, "controller": controller}
    wrong = {name: facts[name] for name, value in expected.items() if facts[name] != value}
    if wrong:
        raise BuildError(f"{controller}: expected {expected}, got {wrong}")
    return facts


def prove(plan: Plan, processes: int = 2) -> str:
    """The line that says what works, or a BuildError."""
    horovodrun = [f"{sysconfig.get_path('scripts')}/horovodrun", "--gloo", "-np", str(processes)]
    facts = run_proof(horovodrun, dict(os.environ), processes, "gloo")
    for name, expected in (("mpi_built", plan.mpicxx is not None), ("nccl_built", plan.cuda.kind != "none")):
        if facts[name] != expected:
            raise BuildError(f"the installed Horovod has {name}={facts[name]}, planned was {expected}")
    mpi = "no (none on this machine)"
    if plan.mpicxx:
        started = mpirun_command(processes)
        if started is None:
            mpi = "built, NOT RUN: no mpirun here"
        else:
            run_proof(*started, processes, "mpi")
            mpi = f"ok ({processes} processes)"
    nccl = "yes" if facts["nccl_built"] else "no"
    return f"horovod {HOROVOD_VERSION}: gloo ok ({processes} processes), mpi {mpi}, nccl built: {nccl}"


def make(args: argparse.Namespace) -> None:
    """The five steps of the module's docstring."""
    plan = make_plan()
    stamp = stamp_of(plan.key)
    if up_to_date(plan.key) and not (args.explain or args.build_only):
        print(f"{stamp.read_text().strip()} (up to date)")
        return
    explain(plan)
    if args.explain:
        return
    wheel = wheel_for(plan)
    if args.build_only:
        return
    install(wheel)
    try:
        proof = prove(plan)
    except BuildError as error:
        raise BuildError(
            f"{error}\n  built and installed, but it does not work; to build again: rm -r {wheel.parent}"
        ) from None
    for old in stamp.parent.glob(".horovod-*"):
        old.unlink()
    stamp.write_text(proof + "\n")
    print(proof)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--explain", action="store_true", help="say what would be chosen, and stop")
    parser.add_argument("--build-only", action="store_true", help="fill the wheel cache, install nothing")
    args = parser.parse_args()
    try:
        with locked(Path(sys.prefix) / ".horovod.lock"):  # two installs at once leave half of each
            make(args)
    except BuildError as error:
        sys.exit(f"horovod: {error}")
    except KeyboardInterrupt:
        sys.exit("horovod: interrupted; nothing unfinished is kept, the next call starts again")


if __name__ == "__main__":
    main()

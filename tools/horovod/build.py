"""Build the wheel of a plan into the cache, and install it: source, patches, compilation, cache, installation."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

from runtime.file_lock import file_lock
from tools.requirements import CONSTRAINTS, locked, name_of, requirements

from .choose import CacheKey, Plan
from .commands import BuildError, failure_text, pip, run_logged
from .recipe import BUILD_SETTINGS, CPU_ONLY_EDIT, HOROVOD_VERSION, SDIST_SHA256, SOURCE_EDITS
from .toolkits import cuda_home, nccl_home

# --- Source and environment of the build ------------------------------------------------------------------------------


def pip_install(group: str, folder: Path) -> list[str | Path]:
    """Return the command that installs what a group needs, without Horovod itself. `folder`: where to write its packages."""
    if os.environ.get("HASHES") == "off":
        pinned = [line for line in requirements([group]) if name_of(line) != "horovod"]
        return [*pip("install"), "--constraint", CONSTRAINTS, *pinned]
    path = folder / f"{group}.txt"
    path.write_text("\n".join(locked([group])))
    return [*pip("install"), "--require-hashes", "--no-deps", "--no-build-isolation", "--requirement", path]


def install_build_requirements(log: Path) -> None:
    """Install CMake and the other build tools in their pinned versions."""
    run_logged(pip_install("horovod-build", log.parent), log, dict(os.environ))


def fetch_source(work: Path, log: Path) -> Path:
    """Download the release's source. pip checks its SHA-256 before it runs the source's setup.py for the metadata."""
    requirement = work / "horovod.txt"
    requirement.write_text(f"horovod=={HOROVOD_VERSION} --hash=sha256:{SDIST_SHA256}\n")
    command = [*pip("download"), "--no-deps", "--no-binary", "horovod", "--no-build-isolation", "--dest", work]
    run_logged([*command, "--requirement", requirement], log, dict(os.environ))
    shutil.unpack_archive(next(work.glob("horovod-*.tar.gz")), work)
    return work / f"horovod-{HOROVOD_VERSION}"


def edit_source(source: Path, plan: Plan) -> None:
    """Patch the source for today's torch. Raise an error if a text to replace is missing: this is another release."""
    edits = [*SOURCE_EDITS, *([CPU_ONLY_EDIT] if plan.cuda.kind == "none" else [])]
    for name, old, new in edits:
        path = source / name
        text = path.read_text()
        if old not in text:
            raise BuildError(
                f"{name} of Horovod's source does not hold {old!r}; this script knows {HOROVOD_VERSION} only"
            )
        path.write_text(text.replace(old, new.format(cxx=plan.key.cxx_standard)))


def jobs() -> int:
    """Return the number of parallel compilers: one per core, at most one per 2 GiB of memory, at most 16."""
    if os.environ.get("JOBS"):
        return max(1, int(os.environ["JOBS"]))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory_gib / 2), 16))


def build_environment(plan: Plan, work: Path, log: Path) -> dict[str, str]:
    """Return the build's environment, without the HOROVOD_* and make variables of the caller."""
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


# --- The wheel and its cache ------------------------------------------------------------------------------------------


def cache_root() -> Path:
    """Return the wheel cache, which lies outside the clone: all clones and environments share it."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tsm-at-scale" / "wheels"
    if re.search(r"[^\w./-]", str(root)):
        # Seen: with a plus sign in the path the compiled library lands outside the wheel, and the build still succeeds.
        raise BuildError(
            f"Horovod cannot be built in {root}. Fix: set XDG_CACHE_HOME to a path of plain letters and digits"
        )
    return root


def cached_wheel(folder: Path) -> Path | None:
    """Return the finished wheel of a cache folder, if there is one."""
    return next(iter(sorted(folder.glob("horovod-*.whl"))), None)


def check_wheel(wheel: Path, log: Path) -> None:
    """Reject a wheel without its compiled part: Horovod's setup.py can succeed without it."""
    with zipfile.ZipFile(wheel) as archive:
        if not any(re.fullmatch(r"horovod/torch/mpi_lib_v2\S*\.so", name) for name in archive.namelist()):
            raise BuildError(failure_text(log, f"{wheel.name} holds no compiled horovod/torch/mpi_lib_v2"))


def compile_wheel(plan: Plan, work: Path, log: Path) -> Path:
    """Compile the patched source into a wheel in the work folder."""
    install_build_requirements(log)
    source = fetch_source(work, log)
    edit_source(source, plan)
    environment = build_environment(plan, work, log)
    command = [*pip("wheel"), "--verbose", "--no-build-isolation", "--no-deps", "--wheel-dir", work / "wheel", "."]
    run_logged(command, log, environment, cwd=source)
    wheel = next((work / "wheel").glob("horovod-*.whl"))
    check_wheel(wheel, log)
    return wheel


def build_wheel(plan: Plan, folder: Path) -> Path:
    """Compile in a work folder, then rename the wheel into the cache folder. The log stays beside it."""
    work = folder / "work"
    # A killed build left its work folder.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    log = folder / "build.log"
    log.unlink(missing_ok=True)
    print(f"  building with {jobs()} compilers, some minutes; log: {log}", flush=True)
    start_s = time.monotonic()
    try:
        built = compile_wheel(plan, work, log)
        (folder / "key.json").write_text(json.dumps(asdict(plan.key), indent=2) + "\n")
        wheel = folder / built.name
        built.replace(wheel)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"  built in {(time.monotonic() - start_s) / 60:.1f} minutes: {wheel}", flush=True)
    return wheel


def wheel_for(plan: Plan) -> Path:
    """Return the plan's wheel from the cache, or build it."""
    folder = cache_root() / plan.key.digest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A second build of the same key waits here, and then finds the wheel.
    with file_lock(folder.with_name(f"{folder.name}.lock")):
        wheel = cached_wheel(folder)
        if wheel is not None:
            print(f"  from the cache: {wheel}", flush=True)
            return wheel
        return build_wheel(plan, folder)


# --- Installation -----------------------------------------------------------------------------------------------------


def install(wheel: Path) -> None:
    """Install the pinned dependencies, then the wheel without its own, which would bring other versions."""
    with tempfile.TemporaryDirectory() as folder:
        needed = [*pip_install("horovod", Path(folder)), "--quiet"]
        for command in (needed, [*pip("install"), "--quiet", "--no-deps", "--force-reinstall", wheel]):
            if subprocess.run(command, check=False).returncode:
                raise BuildError(f"pip could not install into {sys.prefix}; the wheel itself is good: {wheel}")


def stamp_of(key: CacheKey) -> Path:
    """Return the file in the environment that marks the Horovod of this key as installed and proven."""
    return Path(sys.prefix) / f".{key.digest()}"


def up_to_date(key: CacheKey) -> bool:
    """Return whether the installed Horovod is still the proven one of this key."""
    stamp = stamp_of(key)
    if not stamp.is_file():
        return False
    try:
        metadata = importlib.metadata.distribution("horovod")
    except importlib.metadata.PackageNotFoundError:
        return False
    installed = Path(str(metadata.locate_file(f"horovod-{HOROVOD_VERSION}.dist-info/RECORD")))
    return installed.is_file() and installed.stat().st_mtime <= stamp.stat().st_mtime

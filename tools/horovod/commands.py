"""Run the commands of the build with a log, and turn a failed one into an error that names the likely fix."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# (pattern in a failed build's log, its fix). The first match is printed.
LIKELY_FIXES = (
    (r"Python\.h: No such file", "install Python's headers: apt-get install python3.11-dev"),
    (r"No CMAKE_CXX_COMPILER|c\+\+: not found|g\+\+: not found", "install a C++ compiler: apt-get install g++"),
    (
        r"Could NOT find MPI",
        "the MPI compiler wrapper exists but does not work: apt-get install libopenmpi-dev openmpi-bin",
    ),
    (r"Could NOT find NCCL", "set HOROVOD_NCCL_HOME to a folder that holds include/nccl.h and lib/libnccl.so*"),
    (r"unsupported GNU version", "nvcc is older than the compiler: set CXX and CUDAHOSTCXX to an older g++"),
    (r"C\+\+\d+ (or later )?compatible compiler|unrecognized .*-std=", "the compiler is too old for torch: set CXX"),
    (
        r"cannot find -lcuda|CUDAToolkit.*(missing|NOTFOUND)|Could NOT find CUDAToolkit",
        "set CUDA_HOME to a complete toolkit",
    ),
    (r"Killed signal|out of memory|Killed", "a compiler ran out of memory: JOBS=1 make horovod"),
    (r"No space left on device", "free some space, or set XDG_CACHE_HOME to a folder on a larger disk"),
    (
        r"Could not find a version|Connection|Temporary failure in name resolution",
        "pip could not reach its package index",
    ),
)


class BuildError(Exception):
    """An error that the user can fix; its text says how."""


def first_line(*command: str | Path) -> str:
    """Return the first line that a command prints, or "" if it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return next(iter((done.stdout.strip() or done.stderr.strip()).splitlines()), "")


def pip(*command: str) -> list[str | Path]:
    """Return a command of this environment's pip, without pip's version check."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *command]


def run_logged(command: Sequence[str | Path], log: Path, environment: dict[str, str], cwd: Path | None = None) -> None:
    """Run a command with its output in the log. On failure raise an error with the end of the log and the likely fix."""
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
    """Format an error: what failed, the first errors and the end of the log, the log's path, and the likely fix."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.search(r"\berror\b|CMake Error", line, re.IGNORECASE)]
    shown = "\n".join(f"  | {line[:200]}" for line in [*errors[:5], "...", *lines[-15:]])
    text = "\n".join(lines)
    fix = next((fix for pattern, fix in LIKELY_FIXES if re.search(pattern, text)), "read the first error in the log")
    return f"{what}\n{shown}\n  log: {log}\n  Fix (likely): {fix}"

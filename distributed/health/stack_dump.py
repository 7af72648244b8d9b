"""What a process is doing, in words: its own stacks, and what can be learnt of another one on the same node."""

import faulthandler
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_LIMIT_S = 10.0  # for py-spy
_SPIED = 3  # processes of a rank whose stacks are wanted: each takes a second


def own_stacks() -> str:
    """The Python stacks of all threads of this process, and what can be learnt of those that it started, its loader's workers."""
    started = descendants(os.getpid())
    parts = [stacks_of(pid) if place < _SPIED else _kernel_state(pid) for place, pid in enumerate(started)]
    return "\n".join([_thread_stacks(), *parts])


def _thread_stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def stacks_of(pid: int) -> str:
    """Another process of this node, which may be stopped or deaf: what the kernel says of it, and its stacks if py-spy is there."""
    return f"{_kernel_state(pid)}\n{_spied_stacks(pid)}"


def descendants(pid: int) -> list[int]:
    """Processes that this one started, those that they started, and so on; the last to be started first."""
    found: list[int] = []
    try:
        children = [
            int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()
        ]
    except OSError:  # ended meanwhile
        children = []
    for child in sorted(children, reverse=True):
        found += [*descendants(child), child]
    return found


def _kernel_state(pid: int) -> str:
    """Its state (T is stopped, D waits for a disk or a file server) and the kernel function that it sleeps in."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        state = next(line.split(":", 1)[1].strip() for line in status.splitlines() if line.startswith("State:"))
        return f"process {pid}: {state}, in {Path(f'/proc/{pid}/wchan').read_text() or 'nothing'}"
    except (OSError, StopIteration):
        return f"process {pid}: not there"


def _spied_stacks(pid: int) -> str:
    beside = Path(sys.executable).parent / "py-spy"
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return "(its stacks need py-spy: pip install py-spy)"
    # Non-blocking: a process that is stopped cannot be paused, and one that hangs must not be held up further.
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"(py-spy: {error})"
    return done.stdout or f"(py-spy: {done.stderr.strip()})"

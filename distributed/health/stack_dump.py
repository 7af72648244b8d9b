"""Stack dumps: of this process, and of other processes on the same node as far as the kernel and py-spy allow."""

import faulthandler
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_PY_SPY_TIMEOUT_S = 10.0

_FUSE_WAIT = "request_wait_answer"
"""Kernel function in which a read from a FUSE file system sleeps, interruptibly: its state is S, not D."""

# Child processes of a rank to run py-spy on: each takes a second.
_MAX_DUMPED = 3


def own_stacks() -> str:
    """Return the Python stacks of all threads of this process, and the stacks or states of its children (loader workers)."""
    children = descendants(os.getpid())
    parts = [stacks_of(pid) if index < _MAX_DUMPED else _kernel_state(pid) for index, pid in enumerate(children)]
    return "\n".join([_thread_stacks(), *parts])


def _thread_stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def stacks_of(pid: int) -> str:
    """Return the kernel state of another process on this node, which may be stopped, and its stacks if py-spy is installed."""
    return f"{_kernel_state(pid)}\n{_py_spy_stacks(pid)}"


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on; the most recently started first."""
    found: list[int] = []
    try:
        children = [
            int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()
        ]
    except OSError:
        # The process has ended meanwhile.
        children = []
    for child in sorted(children, reverse=True):
        found += [*descendants(child), child]
    return found


def _kernel_state(pid: int) -> str:
    """Return its state (T: stopped, D: waiting for a disk or a file server) and the kernel function that it sleeps in."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        state = next(line.split(":", 1)[1].strip() for line in status.splitlines() if line.startswith("State:"))
        return f"process {pid}: {state}, in {Path(f'/proc/{pid}/wchan').read_text() or 'nothing'}"
    except (OSError, StopIteration):
        return f"process {pid}: has ended"


def storage_wait(pid: int) -> str:
    """Return a clause for the first process, of this one on this node and its children, that waits for storage; else "".

    A thread waits for storage in state D, or for a FUSE file system. A driver can cause state D, too.
    """
    for process in (pid, *descendants(pid)):
        for task in Path(f"/proc/{process}/task").glob("*"):
            try:
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                function = (task / "wchan").read_text()
            except OSError:
                # The thread has ended meanwhile.
                continue
            if state == "D" or function == _FUSE_WAIT:
                return f", process {process} waits for a disk or file server ({state}, in {function})"
    return ""


def _py_spy_stacks(pid: int) -> str:
    installed = Path(sys.executable).parent / "py-spy"
    program = str(installed) if installed.exists() else shutil.which("py-spy")
    if program is None:
        return "(no stacks: py-spy is not installed. Fix: pip install py-spy)"
    # Non-blocking: a stopped process cannot be paused, and a slow one must not become slower.
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"(py-spy: {error})"
    return done.stdout or f"(py-spy: {done.stderr.strip()})"

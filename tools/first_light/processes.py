"""Commands with a hard time limit: after it, every process that the command started is killed."""

import ctypes
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .settings import CHECKOUT

MARK = "FIRST_LIGHT_MARKS"
"""The environment variable with the marks of a process: its command's, after those of the commands around it."""
_PR_SET_CHILD_SUBREAPER = 36
_KILL_LIMIT_S = 5.0
_OUTPUT_KEPT = 20_000


@dataclass(frozen=True)
class Ended:
    """Outcome of a command."""

    exit_code: int | None
    """None if the command was killed at its limit."""
    duration_s: float
    output: str
    """The end of its output."""

    @property
    def outcome(self) -> str:
        if self.exit_code is None:
            return "timeout"
        return "ok" if self.exit_code == 0 else f"exit code {self.exit_code}"


def run(
    command: Sequence[str | Path], limit_s: float, environment: Mapping[str, str] | None = None, folder: Path = CHECKOUT
) -> Ended:
    """Run a command in the checkout. Needs `adopt_orphans`, once in this process.

    Launchers put ranks into sessions of their own, so that killing a process group does not reach them. Each process that the
    command starts inherits a mark in its environment instead. The output goes to a file, because a pipe would stay open until
    the last of these processes ends.
    """
    mark = new_mark()
    started_s = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=folder, env={**os.environ, **(environment or {}), MARK: mark},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        exit_code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                exit_code = process.wait(max(0.5, limit_s))
        finally:
            kill_tree(mark)
        # A process that hangs in a driver call cannot be killed. It stays.
        with suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_LIMIT_S)
        text = end_of(output)
    return Ended(exit_code, round(time.monotonic() - started_s, 2), text)


def new_mark() -> str:
    """Return this process's own marks and a new one."""
    return os.environ.get(MARK, "") + uuid.uuid4().hex


def end_of(output: IO[bytes]) -> str:
    """Return the last characters of a file, as many as are kept."""
    length = output.seek(0, os.SEEK_END)
    output.seek(max(0, length - _OUTPUT_KEPT))
    return output.read().decode(errors="replace")


def kill_tree(mark: str, root: int | None = None) -> None:
    """Kill every descendant of this process whose environment carries the mark, and the forked process `root` with its tree.

    Linux shows the environment with which a process's program was started. So forked processes show none of their own marks.
    """
    killed: set[int] = set()
    for _ in range(10):
        marked = {pid for pid in descendants() - killed if _is_marked(pid, mark)}
        found = marked | (({root} | descendants(root)) - killed if root else set())
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= found
        if not found:
            return
        # One of them may have started another one.
        time.sleep(0.1)


def adopt_orphans(adopt: bool = True) -> None:
    """Make this process a child subreaper: descendants whose parents ended stay in its tree, and `descendants` finds them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def descendants(root: int | None = None) -> set[int]:
    """Return the living processes in the tree below `root`, by default this process.

    For all other processes this reads only `stat`. Reading a process's environment waits for its memory lock, which an exiting
    process with many GiB holds for a long time.
    """
    children: dict[int, set[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), set()).add(int(path.parent.name))
    found, frontier = set[int](), {root or os.getpid()}
    while frontier:
        frontier = set().union(*(children.get(pid, set()) for pid in frontier)) - found
        found |= frontier
    return found


def _is_marked(pid: int, mark: str) -> bool:
    try:
        return mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # ended meanwhile
        return False

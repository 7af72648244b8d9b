"""Functions that run in forked children of this process, several at a time, each with a hard time limit.

A child has every module that this process has imported, so it starts at once. Importing torch and the project takes ten seconds
on a slow host. This process must never initialise CUDA: no child could use it then.
"""

import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import NoReturn, TypeVar

from .processes import MARK, Ended, adopt_orphans, end_of, kill_tree, new_mark

Key = TypeVar("Key")
_POLL_S = 0.02
_KILL_LIMIT_S = 5.0


def run_forked(
    functions: Mapping[Key, Callable[[], object]], limit_s: Callable[[Key], float], at_once: int = 1
) -> Iterator[tuple[Key, Ended]]:
    """Run the functions, at most `at_once` at a time, and yield (key, Ended) of each when it ends.

    A function's limit in seconds is asked for when it starts. Needs `adopt_orphans`, once in this process.
    """
    waiting = list(functions)
    running: dict[Key, _Fork] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                key = waiting.pop(0)
                running[key] = _Fork(functions[key], limit_s(key))
            for key, ended in [(key, fork.ended()) for key, fork in running.items()]:
                if ended is not None:
                    del running[key]
                    yield key, ended
            time.sleep(_POLL_S)
    finally:
        for fork in running.values():
            fork.kill()


class _Fork:
    """A child and the file that takes its output."""

    def __init__(self, function: Callable[[], object], limit_s: float) -> None:
        self._mark = new_mark()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._started_s = time.monotonic()
        self._limit_s = limit_s
        with warnings.catch_warnings():
            # Python 3.12 warns where libraries have threads. OpenBLAS and OpenMP create new ones in a child.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            _be_child(function, self._output.fileno(), self._mark)

    def ended(self) -> Ended | None:
        """Return how the child ended, or None while it runs. A child past its limit is killed first."""
        duration_s = time.monotonic() - self._started_s
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0 and duration_s <= self._limit_s:
            return None
        exit_code = os.waitstatus_to_exitcode(status) if pid else None
        self.kill(reaped=pid != 0)
        with self._output:
            return Ended(exit_code, round(time.monotonic() - self._started_s, 2), end_of(self._output))

    def kill(self, reaped: bool = False) -> None:
        """Kill the child and whatever it has started. A process that hangs in a driver call stays."""
        kill_tree(self._mark, None if reaped else self._pid)
        deadline_s = time.monotonic() + _KILL_LIMIT_S
        while not reaped and time.monotonic() < deadline_s:
            with suppress(ChildProcessError):
                reaped = os.waitpid(self._pid, os.WNOHANG)[0] != 0
            time.sleep(_POLL_S)


def _be_child(function: Callable[[], object], output: int, mark: str) -> NoReturn:
    """Run the function in this new child and end the process: 0, 1 after an exception, or the code of SystemExit."""
    exit_code: object = 1
    try:
        os.setsid()
        adopt_orphans()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ[MARK] = mark
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, target)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        faulthandler.enable(2)
        function()
        exit_code = 0
    except SystemExit as ended:
        exit_code = 0 if ended.code is None else ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(exit_code if isinstance(exit_code, int) else 1)

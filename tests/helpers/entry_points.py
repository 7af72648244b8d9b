"""Call entry points with many command lines in one process, which imports torch once: a call costs about a second less.

Reads a call per line of standard input, as JSON, and answers each with a line: exit code and output. `absent` names packages
that cannot be imported during the call.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Called:
    """The result of a call."""

    exit_code: int
    output: str

    @property
    def last_line(self) -> str:
        return self.output.splitlines()[-1] if self.output else ""


class EntryPoints:
    """The process that makes the calls."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=CHECKOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT), "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, line: str, environment: dict[str, str] | None = None, absent: tuple[str, ...] = ()) -> Called:
        """Make a call: a line as in a shell, without quotes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        call = {"words": line.split(), "environment": environment or {}, "absent": absent}
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the process ended: {self._process.wait()}"
        return Called(**json.loads(answer))

    def close(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


@cache
def entry_points() -> EntryPoints:
    """Return the process that the tests of this session share. It ends with them."""
    process = EntryPoints()
    atexit.register(process.close)
    return process


def _call(words: list[str], environment: dict[str, str], absent: list[str]) -> int:
    modules, environ = dict(sys.modules), dict(os.environ)
    for name in list(sys.modules):
        if any(name == package or name.startswith(f"{package}.") for package in absent):
            del sys.modules[name]
    # Python raises ImportError for a module that is None.
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    os.environ.update(environment)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        _end_monitor()
        if "torch" in sys.modules:
            # What numerics.deterministic=true sets lasts as long as the process.
            sys.modules["torch"].use_deterministic_algorithms(False)
        sys.modules.update(modules)
        os.environ.clear()
        os.environ.update(environ)
    return 0


def _end_monitor() -> None:
    """End the monitor of a failed call, which would kill this process: for the monitor it is a rank that does not exit."""
    for pid in Path("/proc/thread-self/children").read_text().split():
        if b"distributed.health.monitor" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        call: dict[str, Any] = json.loads(line)
        with tempfile.TemporaryFile("w+") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            exit_code = _call(**call)
            sys.stdout.flush()
            sys.stderr.flush()
            output.seek(0)
            print(json.dumps({"exit_code": exit_code, "output": output.read()}), file=answers, flush=True)


if __name__ == "__main__":
    main()

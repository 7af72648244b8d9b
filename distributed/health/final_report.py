"""Write report.html of a run whose job failed. The monitor starts it, because that outlives all ranks, however they ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from runtime import run_layout
from runtime.checkout import CHECKOUT

_TIMEOUT_S = 120

# The rest describes the job that has ended, to libraries that the report does not use.
_ENVIRONMENT = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "MPLCONFIGDIR", "PYTHONPATH", "LD_LIBRARY_PATH")


def start_report(folder: Path) -> "subprocess.Popen[bytes]":
    """Start report.py for a run folder and return at once. Its errors go to the run's log. Raises OSError."""
    with (folder / run_layout.LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "report.py", str(folder)],
            cwd=CHECKOUT,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            # Kept by exec. It ends a report that a file server holds up.
            preexec_fn=lambda: signal.alarm(_TIMEOUT_S),
        )

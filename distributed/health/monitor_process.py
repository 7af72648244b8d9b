"""Start the monitor of a job as a separate process."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from runtime.checkout import CHECKOUT
from runtime.environment import allow_open_files
from runtime.stop_signals import hidden_from_children

SPARE_CONNECTIONS = 64
"""Connections beside those of the ranks that may be open."""

_OWN_FILES = 32


@dataclass(frozen=True)
class MonitorSettings:
    """The monitor's settings. It accepts only ranks that know `token`."""

    address: str
    host: str
    token: str
    world_size: int
    hang_timeout_s: float | None


def start_monitor(settings: MonitorSettings) -> tuple["subprocess.Popen[str]", int]:
    """Start the monitor as a process that outlives this one; returns the process and its port.

    Raises EnvironmentFault if it may not open a file per rank.
    """
    # It inherits the limit. Login shells allow 1,024 files.
    least = settings.world_size + _OWN_FILES
    allow_open_files(least + SPARE_CONNECTIONS, least, f"for the connections of {settings.world_size} ranks")
    # Slurm signals every process that a job started. The monitor ends after all ranks have, and logs why.
    with hidden_from_children():
        process = subprocess.Popen(
            [sys.executable, "-m", "distributed.health.monitor"],
            # The token goes through a pipe: other users of the node can read a command line.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
            start_new_session=True,
        )
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout:
        process.stdin.write(json.dumps(asdict(settings)) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the monitor did not start: exit code {process.wait()}")
    return process, int(line)

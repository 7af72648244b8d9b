"""Start the monitor of a job as a separate process."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from runtime.checkout import CHECKOUT
from runtime.stop_signals import hidden_from_children


@dataclass(frozen=True)
class MonitorSettings:
    """The monitor's settings. It accepts only ranks that know `token`."""

    address: str
    host: str
    token: str
    world_size: int
    hang_timeout_s: float | None


def start_monitor(settings: MonitorSettings) -> tuple["subprocess.Popen[str]", int]:
    """Start the monitor as a process that outlives this one; returns the process and its port."""
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

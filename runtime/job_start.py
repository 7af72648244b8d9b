"""Find the time at which the launcher started this job, by the clock of this machine."""

import os
import time
from pathlib import Path

# The batch script's start, in seconds since 1970: slurm/job.sh sets it.
_VARIABLE = "TSM_JOB_START"

_PROGRAMS = {
    "local": "local.py",
    "torchrun": "torchrun",
    "horovodrun": "horovodrun",
    "mpirun": "mpirun",
    "jsrun": "jsrun",
}
"""Part of a launcher's command line."""


def job_start_s(launcher: str) -> float:
    """Return the start of the job, in seconds since 1970.

    It is the batch script's start, or that of the launcher if it is an ancestor of this process, or that of this process. Under
    another launcher, or on another node than the launcher's, that is the start of the rank.
    """
    try:
        return float(os.environ[_VARIABLE])
    except (KeyError, ValueError):
        pass
    pid, found, name = os.getpid(), os.getpid(), _PROGRAMS.get(launcher)
    try:
        while name is not None and (pid := _parent(pid)) > 1:
            if name in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                found = pid
        return _started_s(found)
    except (OSError, ValueError):
        # An ancestor ended meanwhile, or /proc is another system's.
        return _started_s(os.getpid())


def _fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on: the second, a name, may contain blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _parent(pid: int) -> int:
    return int(_fields(pid)[1])


def _started_s(pid: int) -> float:
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(_fields(pid)[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s

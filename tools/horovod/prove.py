"""Prove the installed Horovod: one all-reduce of 2 processes over Gloo, and over MPI if MPI was built in."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from .choose import Plan
from .commands import BuildError, first_line
from .recipe import HOROVOD_VERSION

_LIMIT_S = 180


def prove(plan: Plan, processes: int = 2) -> str:
    """Return a line that says what works, or raise a BuildError."""
    horovodrun = [f"{sysconfig.get_path('scripts')}/horovodrun", "--gloo", "-np", str(processes)]
    facts = run_proof(horovodrun, dict(os.environ), processes, "gloo")
    for name, expected in (("mpi_built", plan.mpicxx is not None), ("nccl_built", plan.cuda.kind != "none")):
        if facts[name] != expected:
            raise BuildError(f"the installed Horovod has {name}={facts[name]}, planned was {expected}")
    mpi = "no (none on this machine)"
    if plan.mpicxx:
        started = mpirun_command(processes)
        if started is None:
            mpi = "built, NOT RUN: no mpirun here"
        else:
            run_proof(*started, processes, "mpi")
            mpi = f"ok ({processes} processes)"
    nccl = "yes" if facts["nccl_built"] else "no"
    return f"horovod {HOROVOD_VERSION}: gloo ok ({processes} processes), mpi {mpi}, nccl built: {nccl}"


def mpirun_command(processes: int) -> tuple[list[str], dict[str, str]] | None:
    """Return (command, environment) that starts processes on this machine, or None without an mpirun."""
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        return None
    environment = dict(os.environ)
    flags: list[str] = []
    if re.search(r"open[ -]?mpi|openrte|prte", first_line(mpirun, "--version"), re.IGNORECASE):
        flags = ["--oversubscribe", "--bind-to", "none"]
        if os.geteuid() == 0:
            for prefix in ("OMPI", "PRTE"):
                environment |= {f"{prefix}_ALLOW_RUN_AS_ROOT": "1", f"{prefix}_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [mpirun, *flags, "-np", str(processes)], environment


def run_proof(launcher: list[str], environment: dict[str, str], processes: int, controller: str) -> dict[str, object]:
    """Start prove_rank.py under a launcher, check the facts that rank 0 prints, and return them."""
    program = [*launcher, sys.executable, str(Path(__file__).with_name("prove_rank.py"))]
    try:
        done = subprocess.run(
            program,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(
            f"{controller}: {processes} processes did not finish an all-reduce in {_LIMIT_S} s: {error.output}"
        ) from None
    match = re.search(r"PROOF (\{.*\})", done.stdout)
    if done.returncode or match is None:
        raise BuildError(f"{' '.join(program)}\nfailed with status {done.returncode}:\n{done.stdout}{done.stderr}")
    facts: dict[str, object] = json.loads(match.group(1))
    expected = {"size": processes, "sum": processes * (processes + 1) / 2, "controller": controller}
    wrong = {name: facts[name] for name, value in expected.items() if facts[name] != value}
    if wrong:
        raise BuildError(f"{controller}: expected {expected}, got {wrong}")
    return facts

"""An emulated Slurm cluster of 4 nodes as a pytest plugin, started once per run by the first test that needs it.

A test that crashes a node, or changes its rate, disk, GPUs or environment, restores it: `with cluster.changed(...)`.
"""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .worlds import CHECKOUT

_SCRIPT = CHECKOUT / "tools" / "slurm_emulator" / "cluster.sh"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "ip", "tc")
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
)


def why_no_cluster() -> str | None:
    """Return why this machine cannot run the emulated cluster, or None if it can."""
    if os.geteuid() != 0:
        return "the emulated Slurm cluster needs root"
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"the emulated Slurm cluster needs {', '.join(missing)}: tools/install_system_packages.sh"
    return None


class SlurmCluster:
    """Slurm's commands in the environment of an emulated cluster, and faults of its nodes."""

    def __init__(self, folder: Path, nodes: int, *options: str) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment |= {"TSM_CLUSTER": str(folder), "SLURM_CONF": str(folder / "etc" / "slurm.conf")}
        self.emulator("up", str(nodes), *options)

    def emulator(self, *arguments: str) -> str:
        """Run cluster.sh and return its output."""
        return self.run(str(_SCRIPT), *arguments).stdout

    def run(
        self, *command: str, limit_s: float = 120, check: bool = True, cwd: Path = CHECKOUT
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program; raise AssertionError with the output if it fails or exceeds the time limit."""
        try:
            ended = subprocess.run(
                command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=limit_s
            )
        except subprocess.TimeoutExpired as error:
            said = b"".join(part or b"" for part in (error.stdout, error.stderr)).decode(errors="replace")
            raise AssertionError(f"{shlex.join(command)} runs after {limit_s} s:\n{said}") from None
        if check and ended.returncode != 0:
            raise AssertionError(f"{shlex.join(command)} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
        return ended

    # ---------------------------------------------------------------------------------------------------------------- jobs

    def srun(self, *arguments: str, limit_s: float = 60) -> list[str]:
        """Return the lines that the tasks printed, sorted."""
        return sorted(self.run("srun", *arguments, limit_s=limit_s).stdout.splitlines())

    def sbatch(self, *arguments: str, cwd: Path = CHECKOUT) -> int:
        """Submit a job and return its id (`sbatch --wait` polls after 2, 10, 42 and 162 seconds)."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd).stdout.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """Return Slurm's fields of a job (JobState, Restarts, NodeList, ...); retry while Slurm does not answer."""
        ask = ("scontrol", "--oneliner", "show", "job", str(job))
        for _ in range(5):
            asked = self.run(*ask, check=False)
            if asked.returncode == 0:
                break
            time.sleep(2)
        text = asked.stdout or self.run(*ask).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait_for_state(self, job: int, *states: str, limit_s: float = 120) -> dict[str, str]:
        """Wait until the job is in one of the states; without states, until it has ended."""
        wanted = states or ENDED
        deadline_s = time.monotonic() + limit_s
        while (seen := self.job(job))["JobState"] not in wanted:
            assert time.monotonic() < deadline_s, f"after {limit_s} s job {job} is {seen}"
            time.sleep(0.2)
        return seen

    def cancel_all(self) -> None:
        """Cancel every job and wait until the nodes are idle."""
        self.run("scancel", "--user=root")
        self.wait_until_idle()

    # --------------------------------------------------------------------------------------------------------------- nodes

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=emu", "--format=%N %t").stdout.splitlines()
        return dict(line.split() for line in lines)

    def wait_until_idle(self, limit_s: float = 60) -> None:
        """Wait until no job runs and all nodes are available."""
        deadline_s = time.monotonic() + limit_s
        while set((states := self.node_states()).values()) != {"idle"}:
            assert time.monotonic() < deadline_s, f"after {limit_s} s the nodes are {states}"
            time.sleep(0.2)

    @contextmanager
    def changed(
        self,
        node: str,
        *,
        rate: str | None = None,
        disk: str | None = None,
        gpu_removed: int | None = None,
        gpu_answers: dict[int, str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Iterator[None]:
        """Change a node within a `with` block.

        The changes are the rate of its link (`10mbit`), its disk (`full` or `read-only`), a missing GPU, the answers of
        its GPUs (lines FIELD=VALUE), and environment variables of its tasks.
        """
        gpus = self.folder / "nodes" / node / "gpu"
        tasks = self.folder / "nodes" / node / "disk" / "task_environment"
        if environment is not None:
            tasks.write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
        if rate is not None:
            self.emulator("rate", node, rate)
        if disk is not None:
            self.emulator("disk", node, disk)
        if gpu_removed is not None:
            (gpus / f"nvidia{gpu_removed}").rename(gpus / "removed")
        for gpu, answers in (gpu_answers or {}).items():
            (gpus / f"nvidia{gpu}.answers").write_text(answers)
        try:
            yield
        finally:
            self.emulator("disk", node, "ok")
            self.emulator("rate", node, "none")
            tasks.unlink(missing_ok=True)
            if gpu_removed is not None:
                (gpus / "removed").rename(gpus / f"nvidia{gpu_removed}")
            for gpu in gpu_answers or {}:
                (gpus / f"nvidia{gpu}.answers").unlink()


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster of 4 nodes, n1..n4, that marks a node down after 20 s without an answer."""
    reason = why_no_cluster()
    if reason is not None:
        pytest.skip(reason)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"), 4, "--node-timeout-s", "20")
    yield cluster
    cluster.emulator("down")

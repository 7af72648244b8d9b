"""Every launcher's environment, what contradicts itself, the choice of a backend, and what imports without torch."""

import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distributed.topology import Topology, TopologyError, choose_backend, find_topology

ROOT = Path(__file__).resolve().parent.parent
HOST = socket.gethostname()

# Rank 5 of 8 on the second of two nodes with four processes each.
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
HOROVODRUN = {
    "HOROVOD_RANK": "5",
    "HOROVOD_SIZE": "8",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "4",
    "HOROVOD_CROSS_RANK": "1",
    "HOROVOD_CROSS_SIZE": "2",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
ENVIRONMENTS = {"torchrun": TORCHRUN, "horovodrun": HOROVODRUN, "mpirun": MPIRUN}
EACH = pytest.mark.parametrize("launcher", ENVIRONMENTS)


# --- What a launcher says ---------------------------------------------------------------------------------------------


def test_no_launcher_is_a_world_of_one() -> None:
    assert find_topology({"PATH": "/bin"}) == Topology("none", 0, 1, 0, 1, 0, HOST)


@EACH
def test_a_launchers_place(launcher: str) -> None:
    assert find_topology(ENVIRONMENTS[launcher]) == Topology(launcher, 5, 8, 1, 4, 1, HOST)


def test_uneven_nodes_are_numbered_by_the_launcher() -> None:
    assert find_topology(TORCHRUN | {"LOCAL_WORLD_SIZE": "3", "GROUP_RANK": "1"}).node == 1
    assert find_topology(HOROVODRUN | {"HOROVOD_LOCAL_SIZE": "2", "HOROVOD_CROSS_RANK": "1"}).node == 1


def test_horovodrun_over_mpi_speaks_with_one_voice() -> None:
    assert find_topology(HOROVODRUN | MPIRUN).launcher == "horovodrun"


@EACH
def test_the_job_is_slurms(launcher: str) -> None:
    assert find_topology(ENVIRONMENTS[launcher] | {"SLURM_JOB_ID": "77"}).job_id == "77"


def test_torchruns_own_run_id_is_no_job() -> None:
    assert find_topology(TORCHRUN | {"TORCHELASTIC_RUN_ID": "random"}).job_id is None


# --- What cannot be ---------------------------------------------------------------------------------------------------


def refused(environment: dict[str, str], *parts: str) -> None:
    """The message holds the parts, and a fix."""
    with pytest.raises(TopologyError) as caught:
        find_topology(environment)
    for part in (*parts, "Fix: "):
        assert part in str(caught.value)


@EACH
@pytest.mark.parametrize("index", range(4))
def test_a_missing_variable_is_named(launcher: str, index: int) -> None:
    """Rank, size, local rank or local size; without rank and size there would be no launcher."""
    environment = dict(ENVIRONMENTS[launcher])
    missing = list(environment)[index]
    del environment[missing]
    refused(environment, missing, launcher)


@EACH
@pytest.mark.parametrize("index", range(4))
def test_what_is_not_a_number_is_named(launcher: str, index: int) -> None:
    environment = dict(ENVIRONMENTS[launcher])
    name = list(environment)[index]
    refused(environment | {name: "five"}, f"{name}='five' is not a number")


@EACH
@pytest.mark.parametrize(
    "values",
    [("8", "8", "1", "4"), ("-1", "8", "1", "4"), ("5", "8", "4", "4"), ("5", "8", "1", "9"), ("0", "0", "0", "0")],
)
def test_what_is_out_of_range_is_refused(launcher: str, values: tuple[str, ...]) -> None:
    environment = ENVIRONMENTS[launcher]
    changed = dict(zip(list(environment)[:4], values, strict=True))
    refused(environment | changed, "which cannot be", f"rank {values[0]} of {values[1]}")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_launchers_that_disagree_are_refused(name: str) -> None:
    changed = TORCHRUN | {"RANK": "4", "WORLD_SIZE": "16"}
    refused(MPIRUN | TORCHRUN | {name: changed[name]}, "mpirun says rank 5 of 8", "torchrun says rank")


def test_tasks_of_srun_that_know_nothing_of_each_other_are_refused() -> None:
    refused({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 tasks")


def test_one_task_of_srun_is_a_world_of_one() -> None:
    assert find_topology({"SLURM_STEP_NUM_TASKS": "1"}).size == 1


def test_srun_that_started_torchrun_is_no_contradiction() -> None:
    assert find_topology(TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"}).launcher == "torchrun"


# --- The choice of a backend ------------------------------------------------------------------------------------------


def started_by(launcher: str, size: int) -> Topology:
    return Topology(launcher, 0, size, 0, size, 0, HOST)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize(
    ("launcher", "backend"), [("torchrun", "torch"), ("horovodrun", "horovod"), ("mpirun", "horovod")]
)
def test_auto_follows_the_launcher(launcher: str, backend: str, size: int) -> None:
    assert choose_backend("auto", started_by(launcher, size)) == backend


def test_auto_without_a_launcher_is_single() -> None:
    assert choose_backend("auto", started_by("none", 1)) == "single"


ALLOWED = [
    ("single", "none", 1), ("torch", "none", 1), ("horovod", "none", 1),
    ("single", "torchrun", 1), ("torch", "torchrun", 1), ("torch", "torchrun", 8), ("horovod", "torchrun", 1),
    ("single", "horovodrun", 1), ("horovod", "horovodrun", 1), ("horovod", "horovodrun", 8),
    ("single", "mpirun", 1), ("horovod", "mpirun", 1), ("horovod", "mpirun", 8),
]  # fmt: skip
REFUSED = [
    ("single", "torchrun", 8), ("single", "horovodrun", 8), ("single", "mpirun", 8),
    ("torch", "horovodrun", 1), ("torch", "horovodrun", 8), ("torch", "mpirun", 1), ("torch", "mpirun", 8),
    ("horovod", "torchrun", 8),
]  # fmt: skip


def test_the_tables_hold_every_case() -> None:
    cases = {
        (wanted, launcher, size)
        for wanted in ("single", "torch", "horovod")
        for launcher in ("none", "torchrun", "horovodrun", "mpirun")
        for size in (1, 8)
        if (launcher, size) != ("none", 8)
    }
    assert cases == set(ALLOWED) | set(REFUSED)


@pytest.mark.parametrize(("wanted", "launcher", "size"), ALLOWED)
def test_what_a_launcher_can_start_is_taken(wanted: str, launcher: str, size: int) -> None:
    assert choose_backend(wanted, started_by(launcher, size)) == wanted


@pytest.mark.parametrize(("wanted", "launcher", "size"), REFUSED)
def test_what_a_launcher_cannot_start_is_refused(wanted: str, launcher: str, size: int) -> None:
    processes = "1 process" if size == 1 else "8 processes"
    message = rf"distributed\.backend={wanted}.*{launcher} started {processes}.*Fix: "
    with pytest.raises(TopologyError, match=message):
        choose_backend(wanted, started_by(launcher, size))


def test_another_world_than_asked_for_is_refused() -> None:
    message = "distributed.world_size=4, but torchrun started 8 processes. Fix: start 4 processes, or drop the key"
    with pytest.raises(TopologyError, match=re.escape(message)):
        choose_backend("auto", started_by("torchrun", 8), world_size=4)


def test_the_world_asked_for_is_taken() -> None:
    assert choose_backend("auto", replace(started_by("torchrun", 8), rank=3), world_size=8) == "torch"


# --- Imports ----------------------------------------------------------------------------------------------------------


def test_what_a_preflight_needs_imports_without_torch() -> None:
    code = (
        "import sys\n"
        "import distributed.topology, pipelines.order, pipelines.manifest, training.recipe\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

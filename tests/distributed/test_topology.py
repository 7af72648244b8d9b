"""Each launcher's environment, contradictions in it, the choice of a backend, and modules that import without torch."""

import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distributed.topology import (
    Topology,
    TopologyError,
    choose_backend,
    choose_controller,
    choose_gpu,
    find_topology,
    hosts_of,
    rendezvous,
    tasks_of_nodes,
)

ROOT = Path(__file__).resolve().parents[2]
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
JSRUN = {
    "JSM_NAMESPACE_RANK": "5",
    "JSM_NAMESPACE_SIZE": "8",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "4",
}
# Variables that srun sets for a task, among many others.
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[3-4]",
}
ENVIRONMENTS = {"torchrun": TORCHRUN, "horovodrun": HOROVODRUN, "mpirun": MPIRUN, "jsrun": JSRUN}
EACH = pytest.mark.parametrize("launcher", ENVIRONMENTS)


# --- Launcher variables -----------------------------------------------------------------------------------------------


def test_no_launcher_is_a_world_of_one() -> None:
    assert find_topology({"PATH": "/bin"}) == Topology("none", 0, 1, 0, 1, 0, HOST)


def test_the_local_launcher_has_one_node() -> None:
    environment = {"TSM_LOCAL_RANK": "1", "TSM_LOCAL_SIZE": "4", "TSM_LOCAL_STORE": "/tmp/x/store"}
    assert find_topology(environment) == Topology("local", 1, 4, 1, 4, 0, HOST)


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


def test_tasks_of_srun() -> None:
    assert find_topology(SRUN) == Topology("srun", 5, 8, 1, 4, 1, HOST)
    assert find_topology(SRUN | {"PMIX_RANK": "5", "SLURM_JOB_ID": "7"}).launcher == "srun --mpi=pmix"
    assert find_topology(SRUN | {"PMI_RANK": "5"}).launcher == "srun --mpi=pmi2"
    uneven = find_topology(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,5", "SLURM_LOCALID": "2"})
    assert (uneven.local_rank, uneven.local_size, uneven.node) == (2, 5, 1)


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "horovodrun"])
def test_a_launcher_that_srun_started_knows_more(launcher: str) -> None:
    """torchrun runs once per node under srun; mpirun's daemons are srun tasks."""
    daemon = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert find_topology(daemon | ENVIRONMENTS[launcher]).launcher == launcher


def test_jsruns_mpi_speaks_open_mpis_language() -> None:
    assert find_topology(MPIRUN | JSRUN | {"LSB_JOBID": "77"}) == Topology("jsrun", 5, 8, 1, 4, 1, HOST, "77")


def test_tasks_of_nodes_are_written_out() -> None:
    assert tasks_of_nodes("6(x256)") == [6] * 256
    assert tasks_of_nodes("2(x3),1") == [2, 2, 2, 1]
    assert tasks_of_nodes("8") == [8]
    for wrong in ("", "6(256)", "6(x2", "6,", "x"):
        assert tasks_of_nodes(wrong) == []


@pytest.mark.parametrize(
    ("node_list", "hosts"),
    [
        ("n1", "n1"),
        ("n[1-4]", "n1 n2 n3 n4"),
        ("n[003,007-009],m[1-2]", "n003 n007 n008 n009 m1 m2"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("r1n[3-4],r2n7", "r1n3 r1n4 r2n7"),
        ("r[1-2]n[05-06]", "r1n05 r1n06 r2n05 r2n06"),
        ("a-b[10-12]", "a-b10 a-b11 a-b12"),
        ("x.y.z,q", "x.y.z q"),
        ("", ""),
    ],
)
def test_the_hosts_are_scontrols(node_list: str, hosts: str) -> None:
    assert list(hosts_of(node_list)) == hosts.split()


def test_the_rendezvous_follows_from_job_and_step() -> None:
    environment = SRUN | {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"}
    host, port = rendezvous(environment)
    assert host == "n3"
    assert 20_000 <= port < 30_000
    assert rendezvous(environment | {"SLURM_STEP_ID": "1"})[1] != port
    assert rendezvous(environment | {"SLURM_JOB_ID": "4712"})[1] != port
    assert rendezvous(environment | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}) == ("10.0.0.1", 29500)
    for wrong in ({"SLURM_STEP_NODELIST": ""}, {"MASTER_PORT": "auto"}):
        with pytest.raises(TopologyError, match="Fix: "):
            rendezvous(environment | wrong)


def test_torchruns_own_run_id_is_no_job() -> None:
    assert find_topology(TORCHRUN | {"TORCHELASTIC_RUN_ID": "random"}).job_id is None


# --- Contradictions ---------------------------------------------------------------------------------------------------


def refused(environment: dict[str, str], *parts: str) -> None:
    """Assert that the error message holds the parts and a fix."""
    with pytest.raises(TopologyError) as caught:
        find_topology(environment)
    for part in (*parts, "Fix: "):
        assert part in str(caught.value)


@EACH
@pytest.mark.parametrize("index", range(4))
def test_a_missing_variable_is_named(launcher: str, index: int) -> None:
    """Drop rank, size, local rank or local size; with both rank and size missing, no launcher would be detected."""
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
    refused(environment | changed, "which is impossible", f"rank {values[0]} of {values[1]}")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_launchers_that_disagree_are_refused(name: str) -> None:
    changed = TORCHRUN | {"RANK": "4", "WORLD_SIZE": "16"}
    refused(MPIRUN | TORCHRUN | {name: changed[name]}, "mpirun says rank 5 of 8", "torchrun says rank")


@pytest.mark.parametrize("name", [name for name in SRUN if name != "SLURM_STEP_NODELIST"])
def test_what_srun_leaves_out_is_refused(name: str) -> None:
    environment = dict(SRUN)
    del environment[name]
    # A batch script is not a task of a step.
    if name == "SLURM_STEP_NUM_TASKS":
        assert find_topology(environment).size == 1
    else:
        refused(environment, name)


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_STEP_TASKS_PER_NODE": "4,3"},
        {"SLURM_NODEID": "2"},
        {"SLURM_PROCID": "8"},
        {"SLURM_LOCALID": "4"},
        {"SLURM_STEP_TASKS_PER_NODE": "four"},
    ],
)
def test_what_srun_cannot_have_said_is_refused(changed: dict[str, str]) -> None:
    refused(SRUN | changed, "which is impossible")


def test_one_task_of_srun_is_a_world_of_one() -> None:
    """Tasks of a sweep are named after their job; a command in a shell of an allocation is not."""
    assert find_topology({"SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7"}) == Topology(
        "none", 0, 1, 0, 1, 0, HOST, "7"
    )
    assert find_topology({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}) == Topology("none", 0, 1, 0, 1, 0, HOST)


def test_srun_that_started_torchrun_is_no_contradiction() -> None:
    assert find_topology(TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"}).launcher == "torchrun"


# --- Choice of a backend ----------------------------------------------------------------------------------------------


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
    ("single", "local", 1), ("torch", "local", 1), ("torch", "local", 8), ("horovod", "local", 1),
    ("single", "horovodrun", 1), ("horovod", "horovodrun", 1), ("horovod", "horovodrun", 8),
    ("single", "mpirun", 1), ("horovod", "mpirun", 1), ("horovod", "mpirun", 8),
]  # fmt: skip
REFUSED = [
    ("single", "torchrun", 8), ("single", "horovodrun", 8), ("single", "mpirun", 8),
    ("torch", "horovodrun", 1), ("torch", "horovodrun", 8), ("torch", "mpirun", 1), ("torch", "mpirun", 8),
    ("horovod", "torchrun", 8), ("single", "local", 8), ("horovod", "local", 8),
]  # fmt: skip


def test_the_tables_hold_every_case() -> None:
    cases = {
        (wanted, launcher, size)
        for wanted in ("single", "torch", "horovod")
        for launcher in ("none", "local", "torchrun", "horovodrun", "mpirun")
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
        "import distributed.topology, pipelines.stream.order, pipelines.manifest, training.recipe\n"
        "import slurm.preflight.judge, slurm.preflight.node, tools.slurm_emulator.rehearse\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- Topology of a launcher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "wanted", "controller"),
    [
        ("srun", "auto", "gloo"),
        ("srun --mpi=pmix", "auto", "mpi"),
        ("srun --mpi=pmix", "gloo", "gloo"),
        ("srun --mpi=pmi2", "mpi", "mpi"),
        ("mpirun", "auto", None),
        ("jsrun", "mpi", "mpi"),
        ("horovodrun", "auto", None),
        ("none", "gloo", None),
    ],
)
def test_how_horovods_ranks_find_each_other(launcher: str, wanted: str, controller: str | None) -> None:
    assert choose_controller(wanted, Topology(launcher, 0, 2, 0, 2, 0, HOST)) == controller


@pytest.mark.parametrize(("launcher", "wanted"), [("srun", "mpi"), ("mpirun", "gloo")])
def test_a_way_that_the_launcher_does_not_offer_is_refused(launcher: str, wanted: str) -> None:
    with pytest.raises(TopologyError, match=r"Fix: start with .*srun"):
        choose_controller(wanted, Topology(launcher, 0, 2, 0, 2, 0, HOST))


def test_the_backend_under_srun() -> None:
    plain, pmix = Topology("srun", 0, 8, 0, 4, 0, HOST), Topology("srun --mpi=pmix", 0, 8, 0, 4, 0, HOST)
    assert [choose_backend("auto", plain), choose_backend("auto", pmix)] == ["torch", "horovod"]
    for topology in (plain, pmix):
        assert [choose_backend(wanted, topology, 8) for wanted in ("torch", "horovod")] == ["torch", "horovod"]
        with pytest.raises(TopologyError, match="srun.* started 8 processes"):
            choose_backend("single", topology)
        with pytest.raises(TopologyError, match="world_size=1536, but srun.* started 8 processes"):
            choose_backend("auto", topology, 1536)


def test_the_gpu_in_each_shape_that_slurm_gives() -> None:
    last = Topology("srun", 11, 12, 5, 6, 1, HOST)
    # --gres=gpu:6 or no binding: the task sees all GPUs.
    assert choose_gpu(6, last) == 5
    # More GPUs than tasks.
    assert choose_gpu(8, last) == 5
    # --gpus-per-task=1: the task sees only its own.
    assert choose_gpu(1, last) == 0
    with pytest.raises(TopologyError, match="6 processes on .* see 4 GPUs. Fix: start 4"):
        choose_gpu(4, last)
    with pytest.raises(TopologyError, match="sees no GPU"):
        choose_gpu(0, last)

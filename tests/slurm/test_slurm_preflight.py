"""Preflight names exactly the bad nodes: its rules on synthetic reports, and whole runs on an emulated cluster."""

import errno
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from runtime.environment import EnvironmentFault
from slurm.preflight import environment
from slurm.preflight.environment import try_folder
from slurm.preflight.judge import judge
from slurm.preflight.node import kernel_list, near_cores, node_name, try_disk
from slurm.preflight.node_faults import gpu_faults, is_near
from slurm.preflight.pairs import Floors, Measured, judge_pairs, retrial, rounds
from slurm.preflight.reports import Expected, Judgement, Reports
from tests.helpers.slurm_cluster import SlurmCluster
from tests.helpers.small_disk import mounted
from tests.helpers.worlds import CHECKOUT

NODES = ["n1", "n2", "n3", "n4"]
EXPECTED = Expected(nodes=NODES, tasks=4, gpus=0, all_reduce=False)


# --------------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 33, 256])
def test_every_node_meets_both_neighbours_and_never_two_at_once(count: int) -> None:
    nodes = [f"n{number}" for number in range(count)]
    met: dict[str, set[str]] = {node: set() for node in nodes}
    for pairs in rounds(nodes):
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
        for one, other in pairs:
            met[one].add(other)
            met[other].add(one)
    assert all(len(partners) == min(2, count - 1) for partners in met.values())
    assert len(rounds(nodes)) <= 3


def test_one_node_has_no_pairs() -> None:
    assert rounds(["n1"]) == []


def measure(nodes: list[str], slow: set[str]) -> list[Measured]:
    """Measurements of all rounds when these nodes are slow: 5 MB/s, otherwise 500."""

    def speed(pair: tuple[str, str]) -> Measured:
        return Measured(pair, 5.0 if slow & set(pair) else 500.0, 100.0)

    measured = [speed(pair) for pairs in rounds(nodes) for pair in pairs]
    return measured + [speed(pair) for pair in retrial(measured, Floors(100.0))]


@pytest.mark.parametrize("slow", [set(), {"n2"}, {"n1", "n2"}, {"n1", "n3"}, {"n2", "n3", "n4"}, {"n0", "n5", "n7"}])
@pytest.mark.parametrize("count", [8, 9])
def test_slow_nodes_are_told_from_their_partners(slow: set[str], count: int) -> None:
    verdict = judge_pairs(measure([f"n{number}" for number in range(count)], slow), Floors(100.0))
    assert set(verdict.slow) == slow
    assert verdict.undecided == []


def test_nobody_is_named_where_nobody_is_fast() -> None:
    verdict = judge_pairs(measure(["n1", "n2"], {"n2"}), Floors(100.0))
    assert verdict.slow == []
    assert verdict.undecided == ["n1", "n2"]


@pytest.mark.parametrize("count", [3, 4, 9])
def test_without_a_floor_far_slower_than_others_is_slow(count: int) -> None:
    nodes = [f"n{number}" for number in range(count)]
    assert judge_pairs(measure(nodes, {"n2"}), Floors()).slow == ["n2"]


def test_what_busy_processors_do_is_not_slow() -> None:
    seen = [
        Measured(("n1", "n2"), 261.0, 216.0),
        Measured(("n2", "n4"), 277.0, 1196.0),
        Measured(("n4", "n1"), 1357.0, 293.0),
    ]
    assert judge_pairs(seen, Floors()).slow == []


def test_a_late_node_is_slow_too() -> None:
    late = [Measured(pair, 500.0, 900.0 if "n3" in pair else 100.0) for pairs in rounds(NODES) for pair in pairs]
    assert judge_pairs(late, Floors(max_latency_us=500.0)).slow == ["n3"]


# ------------------------------------------------------------------------------------------------------------------- judging


def healthy(node: str, rank: int) -> list[dict[str, Any]]:
    return [
        {"preflight": "place", "host": node, "rank": rank, "size": 4, "local_rank": 0, "cores": "0-6"},
        {"preflight": "clock", "host": node, "offset_s": 0.001, "round_trip_s": 0.0001},
        {"preflight": "disk", "host": node, "free_gib": 100.0, "write_mb_s": 500.0},
        {"preflight": "environment", "host": node, "shared_mib": 9e3, "shared_free_mib": 9e3, "notes": []},
        {"preflight": "versions", "host": node, "versions": {"python": "3.11.7", "torch": "2.14.1"}},
        {"preflight": "gpus", "host": node, "count": 0},
    ]


def judged(
    changes: dict[str, dict[str, dict[str, Any] | None]], expected: Expected = EXPECTED, said: str = ""
) -> Judgement:
    """Judgement of healthy reports with changes, by node and kind of report; None removes the report."""
    lines = [said]
    for rank, node in enumerate(NODES):
        for each in healthy(node, rank):
            change = changes.get(node, {}).get(each["preflight"], {})
            if change is not None:
                lines.append(json.dumps(each | change))
    return judge(Reports(lines), expected)


ALL = dict.fromkeys(["place", "clock", "disk", "environment", "versions", "gpus"])


def test_healthy_nodes_are_well() -> None:
    found = judged({})
    assert (found.exit_code, found.notes) == (0, [])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"clock": {"offset_s": -30.0}}, "30.0 s behind"),
        ({"clock": {"error": "timed out"}}, "clock: timed out"),
        ({"disk": {"error": "No space left on device"}}, "disk: No space left"),
        ({"disk": {"free_gib": 1.0}}, "1.0 GiB free"),
        ({"versions": {"versions": {"python": "3.11.7", "torch": "2.3.0"}}}, "torch 2.3.0, the others 2.14.1"),
        ({"versions": {"versions": {"python": "3.11.7"}}}, "torch none"),
        ({"place": {"size": 1}}, "has world size 1, Slurm has 4 tasks"),
        ({"environment": {"error": "TMPDIR has 99 bytes. Fix: TMPDIR=/tmp"}}, "TMPDIR=/tmp"),
        ({"environment": {"shared_mib": 64.0, "shared_free_mib": 1.0}}, "/dev/shm has 1 of 64 MiB free for 1 ranks"),
        ({"disk": None, "environment": None, "versions": None, "gpus": None}, "hangs in the check of its disk"),
        (ALL, "did not answer"),
    ],
)
@pytest.mark.parametrize("node", ["n1", "n3"])
def test_a_fault_is_found_and_its_node_named(changes: dict[str, dict[str, Any] | None], what: str, node: str) -> None:
    found = judged({node: changes}, replace(EXPECTED, min_free_gib=10.0))
    assert list(found.bad) == [node]
    assert any(what in each for each in found.bad[node])
    assert all("Fix: " in each for each in found.bad[node])
    assert found.exit_code == 2


def test_what_ranks_repair_is_a_note() -> None:
    found = judged(
        {"n2": {"environment": {"notes": ["TMPDIR is too long"], "shared_mib": 64.0, "shared_free_mib": 64.0}}}
    )
    assert found.exit_code == 0
    assert (
        found.notes[0] == "n2: TMPDIR is too long" and "n2: shared memory: /dev/shm has 64 of 64 MiB" in found.notes[1]
    )


def test_a_node_that_does_not_see_the_run_folder_is_a_fault(tmp_path: Path) -> None:
    for writes in (True, False):
        assert try_folder(tmp_path, writes) == []
        with pytest.raises(EnvironmentFault, match="missing: No such file or directory. Fix: outputs="):
            try_folder(tmp_path / "missing", writes)


def test_a_full_run_folder_is_a_fault_of_the_writing_node_only(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "100k") as disk:
        assert try_folder(disk, writes=False) == []
        with pytest.raises(EnvironmentFault, match="No space left"):
            try_folder(disk, writes=True)


def test_a_run_folder_without_locks_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: Any, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(environment.fcntl, "flock", no_locks)
    (note,) = try_folder(tmp_path, writes=True)
    assert "without locks" in note


def test_the_first_node_may_be_the_one_whose_clock_is_wrong() -> None:
    offsets: dict[str, dict[str, dict[str, Any] | None]] = {node: {"clock": {"offset_s": 60.0}} for node in NODES[1:]}
    found = judged(offsets)
    assert list(found.bad) == ["n1"]


def test_a_slow_answer_is_no_wrong_clock() -> None:
    assert judged({"n2": {"clock": {"offset_s": 1.4, "round_trip_s": 1.0}}}).exit_code == 0


def test_where_srun_cannot_reach_a_node_the_others_are_not_blamed() -> None:
    said = "srun: error: Task launch for StepId=7.0 failed on node n3: Communication connection failure"
    found = judged(dict.fromkeys(NODES, ALL), said=said)
    assert list(found.bad) == ["n3"]


def test_checks_that_did_not_end_are_no_success() -> None:
    assert judged({}, said='{"preflight": "unfinished", "code": 124}').exit_code == 3


def test_gpus_are_counted_and_their_health_is_asked_for() -> None:
    gpu = {"preflight": "gpu", "host": "n2", "index": "0", "bus": "0", "driver": "595", "cores": ""}
    expected = replace(EXPECTED, nodes=["n2"], tasks=1, gpus=1)

    def reports(count: int, **changes: str) -> Reports:
        parts = [each | ({"size": 1, "rank": 0} if each["preflight"] == "place" else {}) for each in healthy("n2", 0)]
        parts = [each | ({"count": count} if each["preflight"] == "gpus" else {}) for each in parts]
        return Reports(json.dumps(each) for each in [*parts, gpu | changes])

    assert judge(reports(1), expected).exit_code == 0
    (missing,) = judge(reports(0), expected).bad["n2"]
    assert "has 0 GPUs, 1 are expected" in missing
    (broken,) = judge(reports(1, uncorrected="3"), expected).bad["n2"]
    assert "GPU 0: 3 uncorrected memory errors" in broken
    (note,) = judge(reports(1, cores="21-41"), expected).notes
    assert "local rank 0 runs on cores 0-6, its GPU is near 21-41" in note


def test_faults_of_a_gpu() -> None:
    assert (
        gpu_faults({"uncorrected": "[N/A]", "retired": "[N/A]", "remap_failure": "No", "slowdown": "Not Active"}) == []
    )
    assert len(gpu_faults({"uncorrected": "1", "retired": "Yes", "remap_failure": "Yes", "slowdown": "Active"})) == 4


def test_cores_near_a_gpu(tmp_path: Path) -> None:
    device = tmp_path / "0000:1b:00.0"
    device.mkdir()
    (device / "local_cpulist").write_text("0-20,42-62\n")
    assert near_cores("00000000:1B:00.0", tmp_path) == "0-20,42-62"
    assert near_cores("00000000:1C:00.0", tmp_path) == ""
    assert is_near("0-6", "0-20,42-62")
    assert is_near("0-41", "")
    assert not is_near("18-24", "0-20,42-62")
    assert kernel_list({0, 1, 2, 5, 8, 9}) == "0-2,5,8-9"


def test_the_disk_is_not_tried_through_a_strangers_link(tmp_path: Path) -> None:
    """A name of host and process id can be guessed by another user of the disk."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / f".preflight-{node_name()}-{os.getpid()}").symlink_to(victim)
    try_disk(disk)
    assert victim.read_text() == "mine"


def test_a_disk_that_takes_no_file_is_an_error(tmp_path: Path) -> None:
    tried = try_disk(tmp_path)
    assert tried["write_mb_s"] > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file"):
        try_disk(tmp_path / "missing")


# ------------------------------------------------------------------------------------------------------------- the all-reduce


def all_reduce(nodes: int, absent: set[int], port: int, limit_s: float) -> Judgement:
    """Judgement after an all-reduce among local processes as nodes; the absent ones never start."""
    tasks = []
    for rank in set(range(nodes)) - absent:
        world = {"RANK": rank, "WORLD_SIZE": nodes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank}
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TSM_NETWORK_INTERFACE": "lo",
            "SLURMD_NODENAME": f"n{rank + 1}",
            "OMP_NUM_THREADS": 1,
        }
        environment = os.environ | {name: str(value) for name, value in (world | place).items()}
        command = [sys.executable, "-m", "slurm.preflight.network", "--limit-s", str(limit_s)]
        tasks.append(subprocess.Popen(command, env=environment, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True))
    said = "\n".join(task.communicate(timeout=120)[0] for task in tasks)
    expected = Expected(nodes=[f"n{number + 1}" for number in range(nodes)], tasks=nodes, gpus=0)
    places = [healthy(node, rank)[0] | {"size": nodes} for rank, node in enumerate(expected.nodes)]
    others = [each for rank, node in enumerate(expected.nodes) for each in healthy(node, rank)[1:]]
    lines = [json.dumps(each) for each in places + others]
    assert said.count('"pair"') >= nodes - len(absent) - 1
    return judge(Reports([*said.splitlines(), *lines]), expected)


@pytest.mark.slow
def test_an_odd_number_of_nodes_measures(free_port: int) -> None:
    found = all_reduce(3, set(), free_port, limit_s=100)
    assert (dict(found.bad), found.no_single_node, found.notes) == ({}, [], [])


@pytest.mark.slow
def test_a_node_that_does_not_come_is_named_and_left_out(free_port: int) -> None:
    assert list(all_reduce(4, {2}, free_port, limit_s=30).bad) == ["n3"]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --------------------------------------------------------------------------------------------------- on the emulated cluster


@dataclass(frozen=True)
class Said:
    """Result of a preflight run."""

    exit_code: int
    output: str
    bad_nodes: list[str]

    def faults(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("BAD")]


def preflight(cluster: SlurmCluster, folder: Path, *options: str, **variables: str) -> Said:
    """Run preflight in a batch job on all nodes, two tasks per node, as the launch scripts do."""
    settings = {"TSM_PYTHON": sys.executable, "TSM_LOCAL_DISK": "/mnt/local", "OMP_NUM_THREADS": "1"}
    settings |= {"TSM_PREFLIGHT_ALL_REDUCE": "off", "TSM_PREFLIGHT_LIMIT_S": "100"} | variables
    script, log, bad = folder / "job.sh", folder / "log", folder / "bad_nodes"
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
    script.write_text(
        f"#!/usr/bin/env bash\n{exports}exec slurm/preflight.sh --bad-nodes-file {bad} --run-folder {folder}\n"
    )
    job = ("--nodes=4", "--no-requeue", "--ntasks-per-node=2", *options, f"--output={log}", str(script))
    ended = cluster.wait_for_state(cluster.sbatch(*job))
    return Said(int(ended["ExitCode"].split(":")[0]), log.read_text(), bad.read_text().split() if bad.exists() else [])


def only(said: Said, node: str, what: str) -> None:
    """Assert that preflight names only this node, for this reason."""
    assert said.exit_code == 2, said.output
    assert said.bad_nodes == [node], said.output
    (fault,) = said.faults()
    assert fault.startswith(f"BAD {node}: ")
    assert what in fault


@pytest.mark.slow
def test_healthy_nodes_pass_and_a_slow_one_is_named(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    network = {"TSM_PREFLIGHT_ALL_REDUCE": "on", "TSM_MIN_ALL_REDUCE_MB_S": "20"}
    said = preflight(slurm_cluster, tmp_path, **network)
    assert (said.exit_code, said.faults(), said.bad_nodes) == (0, [], []), said.output
    assert "all-reduce over all 4" in said.output
    with slurm_cluster.changed("n3", rate="40mbit"):
        only(preflight(slurm_cluster, tmp_path, **network), "n3", "all-reduce with any other node")


@pytest.mark.slow
def test_another_version_is_named(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    other = tmp_path / "packages" / "torch-2.3.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.3.0\n")
    with slurm_cluster.changed("n2", environment={"PYTHONPATH": str(other.parent)}):
        only(preflight(slurm_cluster, tmp_path), "n2", "has torch 2.3.0")


@pytest.mark.slow
def test_lost_and_broken_gpus_are_named(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    assert preflight(slurm_cluster, tmp_path, "--gres=gpu:6").exit_code == 0
    with slurm_cluster.changed("n4", gpu_removed=2):
        only(preflight(slurm_cluster, tmp_path, "--gres=gpu:6"), "n4", "has 5 GPUs, 6 are expected")
    with slurm_cluster.changed("n2", gpu_answers={3: "remapped_rows.failure=Yes\n"}):
        only(preflight(slurm_cluster, tmp_path, "--gres=gpu:6"), "n2", "GPU 3: its memory could not be repaired")


@pytest.mark.slow
def test_a_wrong_clock_is_named(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("no libfaketime: tools/install_system_packages.sh")
    wrong = {"LD_PRELOAD": str(library), "FAKETIME": "-90s"}
    with slurm_cluster.changed("n3", environment=wrong):
        only(preflight(slurm_cluster, tmp_path), "n3", "its clock is 90.0 s behind the others'")


@pytest.mark.slow
@pytest.mark.parametrize(("disk", "what"), [("full", "No space left"), ("read-only", "Read-only file system")])
def test_a_useless_disk_is_named(slurm_cluster: SlurmCluster, tmp_path: Path, disk: str, what: str) -> None:
    with slurm_cluster.changed("n4", disk=disk):
        only(preflight(slurm_cluster, tmp_path), "n4", what)


@pytest.mark.slow
def test_a_node_that_hangs_is_named_within_the_limit(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """Tasks of one node start, and hang before they report."""
    stopped = tmp_path / "packages" / "sitecustomize.py"
    stopped.parent.mkdir()
    stopped.write_text("import time\ntime.sleep(300)\n")
    started_s = time.monotonic()
    with slurm_cluster.changed("n2", environment={"PYTHONPATH": str(stopped.parent)}):
        only(preflight(slurm_cluster, tmp_path, TSM_PREFLIGHT_LIMIT_S="12"), "n2", "did not answer")
    assert time.monotonic() - started_s < 60

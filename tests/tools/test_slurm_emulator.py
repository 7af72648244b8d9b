"""The emulated cluster: isolated nodes that can be slowed down, crash and boot again."""

import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import SlurmCluster, why_no_cluster
from tests.helpers.stranger import STRANGER, needs_root

pytestmark = pytest.mark.slow

# Task 1 sends 2 MB to task 0, which prints the throughput in MB/s.
TRANSFER = """
    import os, socket, time
    port, size = 29800, 2_000_000
    if os.environ["SLURM_PROCID"] == "0":
        connection, _ = socket.create_server(("", port)).accept()
        left, started_s = size, time.monotonic()
        while left:
            left -= len(connection.recv(1 << 16))
        print(size / 1e6 / (time.monotonic() - started_s))
    else:
        first = os.environ["SLURM_STEP_NODELIST"].replace("[", "").split("-")[0].split(",")[0]
        for _ in range(100):
            try:
                connection = socket.create_connection((first, port))
                break
            except OSError:
                time.sleep(0.1)
        connection.sendall(bytes(size))
"""

# Shortest round trip of a few bytes between two nodes, in microseconds.
ROUND_TRIP = """
    import os, socket, time
    port = 29801
    if os.environ["SLURM_PROCID"] == "0":
        connection, _ = socket.create_server(("", port)).accept()
        while data := connection.recv(16):
            connection.sendall(data)
    else:
        for _ in range(100):
            try:
                connection = socket.create_connection(("n1", port))
                break
            except OSError:
                time.sleep(0.1)
        shortest_s = 1.0
        for _ in range(20):
            started_s = time.monotonic()
            connection.sendall(b"ping")
            connection.recv(16)
            shortest_s = min(shortest_s, time.monotonic() - started_s)
        print(shortest_s * 1e6)
"""


def transfer_mb_s(cluster: SlurmCluster) -> float:
    (line,) = cluster.srun("--nodelist=n1,n3", "--nodes=2", sys.executable, "-c", textwrap.dedent(TRANSFER))
    return float(line)


def leftovers(folder: Path) -> list[str]:
    """Processes and mounts that remain of the cluster in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text().replace("\0", " ")
            environment = (process / "environ").read_text()
        # The process ended meanwhile.
        except OSError:
            continue
        daemon = any(name in command for name in ("slurmd", "slurmctld", "slurmstepd", "munged", "switch.py"))
        if daemon and (str(folder) in command or str(folder) in environment):
            found.append(command)
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    return found


def networks() -> set[str]:
    """Network namespaces and links of emulated clusters."""
    said = subprocess.run("ip netns list; ip -brief link show", shell=True, capture_output=True, text=True, check=True)
    return {line.split()[0] for line in said.stdout.splitlines() if line.startswith("tsm")}


def test_nodes_have_their_own_name_disk_and_memory(slurm_cluster: SlurmCluster) -> None:
    # Jobs of other tests leave other files.
    mark = "touch /mnt/local/of-$(hostname) /dev/shm/of-$(hostname); echo $(hostname) $(ls -d /mnt/local/of-* /dev/shm/of-*)"
    lines = slurm_cluster.srun("--nodes=4", "bash", "-c", mark)
    assert lines == [f"{node} /dev/shm/of-{node} /mnt/local/of-{node}" for node in slurm_cluster.nodes]


def test_gpus_are_visible_in_the_three_shapes_that_slurm_gives(slurm_cluster: SlurmCluster) -> None:
    def visible(*options: str) -> list[str]:
        return slurm_cluster.srun(
            "--nodes=1", "--ntasks=2", *options, "bash", "-c", "echo ${CUDA_VISIBLE_DEVICES-unset}"
        )

    assert visible("--gres=gpu:6") == ["0,1,2,3,4,5"] * 2
    assert visible("--gpus-per-task=1") == ["0", "1"]
    assert visible("--gres=gpu:6", "--gpu-bind=none") == ["unset"] * 2


def test_a_removed_gpu_is_gone_from_nvidia_smi(slurm_cluster: SlurmCluster) -> None:
    query = ("--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader")
    command = ("--nodelist=n2", "--gres=gpu:6", "nvidia-smi", *query)
    with slurm_cluster.changed("n2", gpu_removed=4, gpu_answers={1: "ecc.errors.uncorrected.volatile.total=7\n"}):
        assert slurm_cluster.srun(*command) == ["0, 0", "1, 7", "2, 0", "3, 0", "5, 0"]
    assert len(slurm_cluster.srun(*command)) == 6


def test_a_full_or_broken_disk_takes_nothing(slurm_cluster: SlurmCluster) -> None:
    write = (
        "--nodelist=n2",
        "bash",
        "-c",
        "(echo word >/mnt/local/file) 2>&1 | sed 's/.*: //'; cat /mnt/local/file; true",
    )
    with slurm_cluster.changed("n2", disk="full"):
        assert slurm_cluster.srun(*write) == ["No space left on device"]
    with slurm_cluster.changed("n2", disk="read-only"):
        assert slurm_cluster.srun(*write) == ["Read-only file system"]
    assert slurm_cluster.srun(*write) == ["word"]


def test_one_node_can_have_another_environment(slurm_cluster: SlurmCluster) -> None:
    with slurm_cluster.changed("n3", environment={"TSM_ODD": "one two"}):
        lines = slurm_cluster.srun("--nodes=4", "bash", "-c", "echo $(hostname) ${TSM_ODD-unset}")
    assert lines == ["n1 unset", "n2 unset", "n3 one two", "n4 unset"]


def test_a_rate_limit_limits(slurm_cluster: SlurmCluster) -> None:
    before_mb_s = transfer_mb_s(slurm_cluster)
    with slurm_cluster.changed("n3", rate="8mbit"):
        assert 0.3 < transfer_mb_s(slurm_cluster) < 1.3
    after_mb_s = transfer_mb_s(slurm_cluster)
    assert min(before_mb_s, after_mb_s) > 10


def test_jobs_leave_a_crashed_node_and_it_can_come_back(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/usr/bin/env bash\n"
        'echo "start ${SLURM_RESTART_COUNT:-0}"\n'
        "[[ ${SLURM_RESTART_COUNT:-0} == 1 ]] || srun bash -c 'echo runs; sleep 300'\n"
    )
    job = slurm_cluster.sbatch(
        "--nodes=2", "--exclude=n1", "--open-mode=append", f"--output={tmp_path}/log", str(script)
    )
    crashed = slurm_cluster.wait_for_state(job, "RUNNING")["BatchHost"]
    log = tmp_path / "log"
    while not log.exists() or log.read_text().count("runs") < 2:
        time.sleep(0.1)
    slurm_cluster.emulator("crash", crashed)
    try:
        seen = slurm_cluster.wait_for_state(job, "COMPLETED")
        assert slurm_cluster.node_states()[crashed].startswith("down")
    finally:
        slurm_cluster.emulator("boot", crashed)
    assert seen["Restarts"] == "1"
    assert seen["BatchHost"] != crashed
    assert [line for line in log.read_text().splitlines() if line.startswith("start")] == ["start 0", "start 1"]
    slurm_cluster.wait_until_idle()


def test_shapes_of_published_machines_are_judged_without_them(slurm_cluster: SlurmCluster) -> None:
    def accepted(*options: str) -> bool:
        ended = slurm_cluster.run("sbatch", "--test-only", "--time=60", *options, "--wrap=true", check=False)
        return ended.returncode == 0

    summit = ("--partition=summit", "--ntasks-per-node=6", "--gres=gpu:6", "--cpus-per-task=7")
    assert accepted(*summit, "--nodes=256")
    assert not accepted(*summit, "--nodes=257")
    assert not accepted(*summit, "--nodes=256", "--gres=gpu:8")
    assert not accepted(*summit, "--nodes=256", "--time=48:00:00")
    assert accepted("--partition=dgx", "--nodes=192", "--ntasks-per-node=8", "--gres=gpu:8", "--cpus-per-task=8")
    assert accepted("--partition=quad", "--nodes=384", "--ntasks-per-node=4", "--gres=gpu:4", "--cpus-per-task=8")


def test_down_leaves_nothing_and_another_cluster_alone(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    before = networks()
    folder = tmp_path / "other"
    other = SlurmCluster(folder, 3, "--delay-us", "2000")
    try:
        assert set(other.node_states().values()) == {"idle"}
        assert other.srun("--nodes=3", "hostname") == other.nodes
        (round_trip_us,) = other.srun(
            "--nodelist=n1,n3", "--nodes=2", sys.executable, "-c", textwrap.dedent(ROUND_TRIP)
        )
        assert 4000 < float(round_trip_us) < 20000
        other.sbatch("--nodes=3", "--output=/dev/null", "--wrap=srun sleep 300")
        assert leftovers(folder)
        again = other.run("tools/slurm_emulator/cluster.sh", "up", "1", check=False)
        assert again.returncode == 1
        assert "one is up already" in again.stderr
    finally:
        other.emulator("down")
    assert leftovers(folder) == []
    assert networks() == before
    assert slurm_cluster.srun("--nodes=4", "hostname") == slurm_cluster.nodes


def up_with(program: str, script: str, folder: Path, nodes: int) -> "subprocess.CompletedProcess[str]":
    """Run `cluster.sh up` in folder/cluster, with one of the programs that it calls replaced by a shell script."""
    if (reason := why_no_cluster()) is not None:
        pytest.skip(reason)
    broken = folder / "bin"
    broken.mkdir()
    (broken / program).write_text(f"#!/bin/sh\n{script}\n")
    (broken / program).chmod(0o755)
    environment = os.environ | {"TSM_CLUSTER": str(folder / "cluster"), "PATH": f"{broken}:{os.environ['PATH']}"}
    command = ["tools/slurm_emulator/cluster.sh", "up", str(nodes)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_failed_start_is_cleared_up(tmp_path: Path) -> None:
    before = networks()
    ended = up_with("slurmd", "exit 1", tmp_path, 2)
    assert ended.returncode == 1
    assert "up failed at 'nsenter" in ended.stderr
    # The start got as far as the nodes.
    assert (tmp_path / "cluster" / "log" / "slurmctld.log").exists()
    assert leftovers(tmp_path) == []
    assert networks() == before


def refusing_links(folder: Path, times: int) -> str:
    """Script for `ip` that refuses to make the link of node n2 this many times."""
    return f"""
        case "$*" in "link add tsm"*-n2*)
            echo refused >>{folder}/refused
            [ $(wc -l <{folder}/refused) -gt {times} ] || {{ echo "RTNETLINK answers: File exists" >&2; exit 2; }}
        esac
        exec {shutil.which("ip")} "$@"
    """


@needs_root
def test_a_strangers_settings_are_not_sourced(tmp_path: Path) -> None:
    """The default folder is in /tmp, where another user may have made it."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "settings").write_text("echo sourced\n")
    os.chown(tmp_path, STRANGER, STRANGER)
    environment = os.environ | {"TSM_CLUSTER": str(tmp_path)}
    ended = subprocess.run(["tools/slurm_emulator/cluster.sh", "env"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 1 and "sourced" not in ended.stdout
    assert "belongs to user id 65534. Fix: TSM_CLUSTER=FOLDER" in ended.stderr


def test_a_link_that_was_refused_is_tried_again(tmp_path: Path) -> None:
    before = networks()
    ended = up_with("ip", refusing_links(tmp_path, times=2), tmp_path, 2)
    environment = os.environ | {"TSM_CLUSTER": str(tmp_path / "cluster")}
    subprocess.run(["tools/slurm_emulator/cluster.sh", "down"], env=environment, check=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "2 nodes are up" in ended.stdout
    assert "try 2 to link tsm" in ended.stderr
    assert networks() == before


def test_links_that_stay_refused_are_reported(tmp_path: Path) -> None:
    before = networks()
    ended = up_with("ip", refusing_links(tmp_path, times=3), tmp_path, 2)
    assert ended.returncode == 1
    assert "File exists" in ended.stderr
    assert "the kernel makes no link for tsm" in ended.stderr
    assert leftovers(tmp_path) == []
    assert networks() == before

"""Names and networks of two nodes, each a network namespace with its own host name and hosts file, joined by one cable.

Both also have a second interface, eth1, that leads nowhere.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import LISTENING_ON_TWO_NODES
from tests.helpers.slurm_cluster import why_no_cluster
from tests.helpers.worlds import CHECKOUT, MARK, World, available

pytestmark = pytest.mark.slow

LIMIT_S = 240

SRUN = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "0",
}
TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "n1"}

# Both nodes' hosts files, and variables of both.
RIGHT = ("10.83.0.1 n1\n10.83.0.2 n2\n",) * 2
DEBIAN = ("127.0.1.1 n1\n10.83.0.2 n2\n", "127.0.1.1 n2\n10.83.0.1 n1\n")
OTHER_NETWORK = ("10.84.0.1 n1\n10.83.0.2 n2\n", "10.84.0.2 n2\n10.83.0.1 n1\n")
NO_OWN_NAME = ("10.83.0.2 n2\n", "10.83.0.1 n1\n")
CASES = {
    "right": ("torch", RIGHT, SRUN),
    "debian": ("torch", DEBIAN, SRUN),
    "other network": ("torch", OTHER_NETWORK, SRUN),
    "debian, torchrun": ("torch", DEBIAN, TORCHRUN | {"TSM_NETWORK_INTERFACE": "eth0"}),
    "no name, address given": ("torch", NO_OWN_NAME, SRUN | {"MASTER_ADDR": "10.83.0.1"}),
    "right, horovod": ("horovod", RIGHT, SRUN),
    "debian, horovod": ("horovod", DEBIAN, SRUN),
}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Two network namespaces, which are n1 and n2."""
    if (reason := why_no_cluster()) is not None:
        pytest.skip(reason)
    # Not the emulated cluster's prefix: its tests, which may run at the same time, compare all names with it.
    names = [f"nodes{os.getpid()}-{node}" for node in ("a", "b")]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "add", "eth1", "type", "veth", "peer", "name", "nowhere")
        ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            for interface, network in (("eth0", "10.83.0"), ("eth1", "10.84.0")):
                ip("-n", name, "addr", "add", f"{network}.{number}/24", "dev", interface)
                ip("-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def start(node: str, number: int, folder: Path, names: list[str]) -> "subprocess.Popen[bytes]":
    """Start the program on a node; it runs these cases."""
    hosts = folder / f"hosts-{number}"
    hosts.write_text("")
    cases = []
    for position, name in enumerate(names):
        backend, files, variables = CASES[name]
        rank = {"SLURM_PROCID": str(number), "SLURM_NODEID": str(number)}
        if "RANK" not in variables and variables.get("WORLD_SIZE"):
            rank = {"RANK": str(number), "GROUP_RANK": str(number)}
        environment = variables | rank | {"MASTER_PORT": str(20_000 + position)}
        cases.append({"name": name, "backend": backend, "hosts": files[number], "environment": environment})
    enter = f'hostname n{number + 1} && mount --bind "$1" /etc/hosts && exec "$2" tests/world_cases/two_nodes.py "$1" "$3" "$4"'
    command = ["nsenter", f"--net=/run/netns/{node}", "unshare", "--mount", "--uts", "sh", "-c", enter, "sh"]
    arguments = [str(hosts), sys.executable, json.dumps(cases), str(folder / f"results-{number}")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT), MARK: str(folder)}
    with (folder / f"log-{number}").open("w") as log:
        return subprocess.Popen([*command, *arguments], cwd=CHECKOUT, env=environment, stderr=log)


def results(nodes: list[str], folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Run cases on both nodes, and return the results of each."""
    processes = [start(node, number, folder, names) for number, node in enumerate(nodes)]
    try:
        for process in processes:
            process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    paths = [folder / f"results-{number}" for number in range(2)]
    assert all(path.exists() for path in paths), [(folder / f"log-{number}").read_text() for number in range(2)]
    return [json.loads(path.read_text()) for path in paths]


def test_two_nodes_meet_whatever_their_own_names_are(nodes: list[str], tmp_path: Path) -> None:
    available(World("horovodrun", 2))
    found = results(nodes, tmp_path, list(CASES))
    for number, on_node in enumerate(found, 1):
        # Horovod refuses what it cannot do.
        refused = on_node.pop("debian, horovod")
        fix = rf"rank {number - 1} on n{number}: .* is 127.0.1.1, .*Fix: the line `10.83.0.{number} n{number}` in /etc/hosts"
        assert re.match(f"TopologyError: {fix}", refused), refused
        assert {name: result[0] for name, result in on_node.items()} == dict.fromkeys(on_node, 2.0)
    for name, (_, addresses) in found[0].items():
        seen = {(kind, re.sub(r"^10\.83\.0\.[12]$", "node", address)) for kind, address in addresses}
        assert seen == LISTENING_ON_TWO_NODES[CASES[name][0]], name

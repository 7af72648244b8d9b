"""Run a program in one process on each of several emulated nodes: network namespaces behind a bridge. Needs root and iproute2.

python benchmarks/emulated_nodes.py NODES MBIT_S plan.py calibrate=emulated experiment=smoke distributed=torch
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_NETWORK = "10.86.0"
_PORT = "20960"


def set_rate(mbit_s: int, node: str | None = None) -> None:
    """Limit what a node sends; None: this process' node."""
    limit = ["rate", f"{mbit_s}mbit", "burst", "32kb", "latency", "400ms"]
    of_node = [] if node is None else ["-n", node]
    subprocess.run(["tc", *of_node, "qdisc", "replace", "dev", "eth0", "root", "tbf", *limit], check=True)


@contextmanager
def emulated_nodes(count: int) -> Iterator[list[str]]:
    """Make nodes, each a namespace with an interface eth0; yield the names of the namespaces."""
    names = [f"emulated{os.getpid()}-{number}" for number in range(1, count + 1)]
    switch = f"emulated{os.getpid()}-switch"
    try:
        for name in (switch, *names):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names, 1):
            port = f"port{number}"
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{_NETWORK}.{number}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "del", name], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def run_on_nodes(names: Sequence[str], arguments: Sequence[str], folder: Path, limit_s: float) -> None:
    """Run `python ARGUMENTS` as one task of srun on each node; logs go to `folder`. Raises RuntimeError if one fails."""
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{_NETWORK}.{number} n{number}\n" for number in range(1, len(names) + 1)))
    processes = []
    try:
        for number, name in enumerate(names):
            processes.append(_start(name, number, len(names), [str(hosts), sys.executable, *arguments], folder))
        codes = [process.wait(limit_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        logs = "\n".join((folder / f"log-{number}").read_text()[-2000:] for number in range(len(names)))
        raise RuntimeError(f"ranks ended with {codes}:\n{logs}")


def _start(name: str, number: int, count: int, command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    enter = f'hostname n{number + 1} && mount --bind "$1" /etc/hosts && shift && exec "$@"'
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")} | {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})",
        "SLURM_STEP_NODELIST": f"n[1-{count}]", "SLURM_LOCALID": "0", "SLURM_PROCID": str(number), "SLURM_NODEID": str(number),
        "MASTER_PORT": _PORT, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    entered = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--mount", "--uts", "sh", "-c", enter, "sh"]
    with (folder / f"log-{number}").open("w") as log:
        return subprocess.Popen([*entered, *command], env=environment, stdout=log, stderr=log)


def main() -> None:
    count, mbit_s, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    with emulated_nodes(count) as names, tempfile.TemporaryDirectory() as folder:
        for name in names:
            set_rate(mbit_s, name)
        run_on_nodes(names, arguments, Path(folder), limit_s=600)
        print((Path(folder) / "log-0").read_text())


if __name__ == "__main__":
    main()

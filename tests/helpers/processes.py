"""Processes found by a variable in their environment, and the addresses on which they accept TCP connections."""

import re
import subprocess
from pathlib import Path

LISTENING = {
    "none": {("monitor", "loopback")},
    "local": {("monitor", "loopback"), ("rank", "loopback")},
    "torchrun": {("launcher", "any"), ("monitor", "loopback"), ("rank", "loopback")},
    "horovodrun": {("launcher", "any"), ("monitor", "loopback")},
    "mpirun": {("launcher", "any"), ("launcher", "loopback"), ("monitor", "loopback"), ("rank", "any")},
}
"""(kind of process, address) of each launcher's job on one machine: the table of docs/security.md."""

LISTENING_ON_TWO_NODES = {
    "torch": {("monitor", "node"), ("rank", "any"), ("rank", "node")},
    "horovod": {("monitor", "node")},
}
"""The same of srun's jobs over Gloo, by backend. `node`: the address by which other nodes reach it; `any`: torch's store."""

_LAUNCHERS = ("launch/local.py", "torch.distributed.run", "horovodrun", "mpirun", "srun", "slurmstepd:")


def processes_with(name: str, value: str) -> dict[int, str]:
    """Return the command line of every living process with this variable, by pid."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{name}={value}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            # The process has ended meanwhile.
            continue
    return found


def command_of(pid: int) -> str:
    """Return the command line of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def listening(processes: dict[int, str]) -> set[tuple[str, str]]:
    """Return (kind of process, address) of each socket on which these processes listen, as `ss -tlnp` shows them.

    Kinds: launcher, monitor, rank, and helper for all others. Addresses: loopback, any (all addresses of the machine), or the
    only one. Processes in other network namespaces, such as those of emulated nodes, need root.
    """
    by_network: dict[str, list[int]] = {}
    for pid in processes:
        try:
            by_network.setdefault(str(Path(f"/proc/{pid}/ns/net").readlink()), []).append(pid)
        except OSError:
            # The process has ended meanwhile.
            continue
    own = str(Path("/proc/self/ns/net").readlink())
    found = set()
    for network, pids in by_network.items():
        enter = [] if network == own else ["nsenter", f"--net=/proc/{pids[0]}/ns/net"]
        shown = subprocess.run([*enter, "ss", "-Htlnp"], capture_output=True, text=True, check=True).stdout
        for line in shown.splitlines():
            address = _kind_of_address(line.split()[3].rsplit(":", 1)[0])
            owners = {int(pid) for pid in re.findall(r"pid=(\d+),", line)}
            found |= {(_kind_of_process(processes[pid]), address) for pid in owners & processes.keys()}
    return found


def _kind_of_process(command: str) -> str:
    words = command.split()
    # A program, a script, or `python [-u] script`, `python -m module`. The words after it may hold any name.
    program = (
        words[2] if len(words) > 2 and words[1] in ("-m", "-u") else words[1] if "python" in words[0] else words[0]
    )
    if program.endswith(_LAUNCHERS):
        return "launcher"
    if program == "distributed.health.monitor":
        return "monitor"
    return "rank" if program.endswith(".py") else "helper"


def _kind_of_address(address: str) -> str:
    if address in ("*", "0.0.0.0", "[::]"):
        return "any"
    return "loopback" if address.startswith("127.") or address == "[::1]" else address

"""Report each task's rank to preflight and, from one task per node, the checks of the node.

Reports are lines of JSON on stdout, which srun forwards to the batch node: no task writes a file on the shared file system. Each
check prints its own line immediately: the first missing line names the check in which a node hangs. Lines stay below 1,024
bytes, up to which srun keeps them whole. Imports without torch: in a rehearsal a thousand tasks start on one machine.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distributed.addresses import rendezvous_address
from distributed.topology import Topology, find_topology, rendezvous
from runtime.environment import EnvironmentFault

from .environment import check_environment

CHECKS = ("clock", "disk", "environment", "versions", "gpus")
"""In the order in which a node runs them."""

_PACKAGES = (
    "torch",
    "horovod",
    "mpi4py",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda110",
    "torchcodec",
    "av",
    "numpy",
)
_ROUND_TRIPS = 10
_TEST_FILE_MIB = 16
_GPU_FIELDS = {
    "index": "index",
    "pci.bus_id": "bus",
    "driver_version": "driver",
    "ecc.errors.uncorrected.volatile.total": "uncorrected",
    "retired_pages.pending": "retired",
    "remapped_rows.pending": "remap_pending",
    "remapped_rows.failure": "remap_failure",
    "clocks_event_reasons.hw_slowdown": "slowdown",
}
_OLDER_NAMES = {"clocks_event_reasons.hw_slowdown": "clocks_throttle_reasons.hw_slowdown"}


def report(kind: str, **values: Any) -> None:
    """Print one report for the judge."""
    print(json.dumps({"preflight": kind, "host": node_name()} | values), flush=True)


def node_name() -> str:
    """Return Slurm's name of this node; its host name may be longer."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


# --------------------------------------------------------------------------------------------------------------------- clock


class TimeServer(socketserver.ThreadingTCPServer):
    """Serve the first node's time to one task of each other node."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int) -> None:
        super().__init__(("", port), _TellTime)
        self.served = threading.Semaphore(0)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _TellTime(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while self.request.recv(1):
            self.request.sendall(struct.pack("!d", time.time()))
        assert isinstance(self.server, TimeServer)
        self.server.served.release()


def clock_offset(host: str, port: int, limit_s: float) -> dict[str, float]:
    """Return this node's clock minus the server's, from the fastest of several round trips, and the round trip's duration.

    The error of the offset is at most half of the round trip.
    """
    deadline_s = time.monotonic() + limit_s
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            break
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)
    best = {"round_trip_s": float("inf")}
    # A busy first node answers late, which shows in the round trip.
    connection.settimeout(max(1.0, deadline_s - time.monotonic()))
    with connection:
        for _ in range(_ROUND_TRIPS):
            before_s, started_s = time.time(), time.perf_counter()
            connection.sendall(b"?")
            answer = connection.recv(8, socket.MSG_WAITALL)
            if len(answer) < 8:
                raise ConnectionError("the first node stopped telling the time")
            (theirs_s,) = struct.unpack("!d", answer)
            round_trip_s = time.perf_counter() - started_s
            if round_trip_s < best["round_trip_s"]:
                best = {"offset_s": before_s + round_trip_s / 2 - theirs_s, "round_trip_s": round_trip_s}
    return best


# ---------------------------------------------------------------------------------------------------------------------- disk


def try_disk(folder: Path) -> dict[str, float]:
    """Measure a disk's free space and write speed: write a file, sync it, read it back and remove it."""
    free_gib = shutil.disk_usage(folder).free / 2**30
    block = os.urandom(1 << 20)
    # A file without a name: another user cannot have made a link of that name, and nothing is left of it.
    with tempfile.TemporaryFile(dir=folder) as file:
        started_s = time.perf_counter()
        for _ in range(_TEST_FILE_MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        write_s = time.perf_counter() - started_s
        # Drop the page cache, so that the file is read from the disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").digest()
    if digest != hashlib.sha256(block * _TEST_FILE_MIB).digest():
        raise OSError(f"{folder}: a file read back differs from what was written")
    return {"free_gib": free_gib, "write_mb_s": _TEST_FILE_MIB * 2**20 / 1e6 / write_s}


# ---------------------------------------------------------------------------------------------------------- versions and GPUs


def versions() -> dict[str, str]:
    """Return the versions of Python and of the job's packages, without importing them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpus(limit_s: float) -> Iterator[dict[str, str]]:
    """Yield each GPU of this node, as nvidia-smi reports it, with the cores near it.

    nvidia-smi takes seconds without its persistence daemon, and hangs if the driver does.
    """
    fields = dict(_GPU_FIELDS)
    while True:
        query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            ended = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise OSError(f"nvidia-smi did not answer within {limit_s:.0f} s") from None
        unknown = re.search(r'Field "([\w.]+)" is not a valid field', ended.stdout + ended.stderr)
        if unknown is None or unknown[1] not in fields:
            break
        # Another driver version has other fields.
        name = fields.pop(unknown[1])
        if unknown[1] in _OLDER_NAMES:
            fields[_OLDER_NAMES[unknown[1]]] = name
    if ended.returncode != 0:
        raise OSError(f"nvidia-smi ended with {ended.returncode}: {(ended.stdout + ended.stderr).strip()[:300]}")
    for line in ended.stdout.splitlines():
        gpu = dict(zip(fields.values(), (value.strip() for value in line.split(",")), strict=True))
        yield gpu | {"cores": near_cores(gpu["bus"])}


def near_cores(bus: str, devices: Path = Path("/sys/bus/pci/devices")) -> str:
    """Return the cores near a PCI device as the kernel's cpulist (`0-20,42-62`); empty if the kernel does not list them.

    nvidia-smi writes 00000000:1B:00.0 where the kernel writes 0000:1b:00.0.
    """
    domain, _, rest = bus.lower().partition(":")
    try:
        return (devices / f"{domain[-4:]}:{rest}" / "local_cpulist").read_text().strip()
    except OSError:
        return ""


def kernel_list(cores: set[int]) -> str:
    """Format cores as the kernel's cpulist: `0-3,8`."""
    parts, rest = [], sorted(cores)
    while rest:
        length = next((i for i, core in enumerate(rest) if core != rest[0] + i), len(rest))
        parts.append(f"{rest[0]}-{rest[length - 1]}" if length > 1 else str(rest[0]))
        rest = rest[length:]
    return ",".join(parts)


# ---------------------------------------------------------------------------------------------------------------------- task


def check_node(place: Topology, nodes: int, options: argparse.Namespace) -> None:
    """Run all checks of this node and report each, also those that fail."""

    def clock() -> None:
        if place.rank == 0:
            report("clock", offset_s=0.0, round_trip_s=0.0)
        else:
            report("clock", **clock_offset(*rendezvous_address(place), options.limit_s))

    def every_gpu() -> None:
        count = 0
        if options.gpus:
            for gpu in gpus(options.limit_s / 2):
                report("gpu", **gpu)
                count += 1
        report("gpus", count=count)

    checks: dict[str, Callable[[], None]] = {
        "clock": clock,
        "disk": lambda: report("disk", **try_disk(options.local_disk)),
        "environment": lambda: report("environment", **check_environment(options.run_folder, place.rank == 0)),
        "versions": lambda: report("versions", versions=versions()),
        "gpus": every_gpu,
    }
    server = TimeServer(rendezvous()[1]) if place.rank == 0 and nodes > 1 else None
    for kind in CHECKS:
        try:
            checks[kind]()
        except (OSError, ValueError, EnvironmentFault) as error:
            report(kind, error=str(error)[:300])
    if server is not None:
        deadline_s = time.monotonic() + options.limit_s
        for _ in range(nodes - 1):
            server.served.acquire(timeout=max(0.0, deadline_s - time.monotonic()))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, required=True, help="of each node")
    parser.add_argument("--local-disk", type=Path, required=True)
    parser.add_argument("--run-folder", type=Path, help="of the job, to check that nodes see it")
    parser.add_argument("--limit-s", type=float, required=True)
    options = parser.parse_args()
    # End before the timeout of srun.
    options.limit_s = max(1.0, options.limit_s - 10)
    try:
        place = find_topology()
    except ValueError as error:
        report("place", error=str(error)[:500])
        return 1
    cores = kernel_list(os.sched_getaffinity(0))
    report("place", rank=place.rank, size=place.size, local_rank=place.local_rank, cores=cores[:200])
    if place.local_rank == 0:
        check_node(place, int(os.environ.get("SLURM_STEP_NUM_NODES", "1")), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

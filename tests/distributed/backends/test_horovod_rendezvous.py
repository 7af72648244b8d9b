"""Horovod's rendezvous under plain srun: it takes only what Horovod sends, and is gone when all ranks have started."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest

from tests.helpers.worlds import CHECKOUT, World, available

TWO_RANKS_BYTES = 66 << 10


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def port() -> Iterator[int]:
    available(World("horovodrun", 2))
    from distributed.backends.horovod_rendezvous import _serve

    port = free_port()
    stop = _serve("127.0.0.1", port, [2])
    yield port
    stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def answer(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def test_it_keeps_values_and_tells_no_files(port: int) -> None:
    assert answer(port, "PUT", "/global/0", b"address")[0] == 200
    assert answer(port, "GET", "/global/0") == (200, b"address")
    assert answer(port, "GET", "/global/1")[0] == 404
    # Horovod's own handler answers 200: it is a file of the working folder.
    assert (CHECKOUT / "runtime" / "lease.py").exists() and answer(port, "HEAD", "/runtime/lease.py")[0] == 400
    for method, path in [("POST", "/global/0"), ("GET", "/a/b/c"), ("DELETE", "/"), ("PUT", "/global")]:
        assert answer(port, method, path, b"")[0] in (400, 501), (method, path)


def test_its_memory_is_limited(port: int) -> None:
    assert answer(port, "PUT", "/global/0", **{"Content-Length": str(TWO_RANKS_BYTES + 1)})[0] == 413
    for wrong in ("", "-1", "1e3", "9" * 5000):
        assert answer(port, "PUT", "/global/0", **{"Content-Length": wrong})[0] == 413, wrong
    for key in range(2):
        assert answer(port, "PUT", f"/global/{key}", bytes(TWO_RANKS_BYTES))[0] == 200
    assert answer(port, "PUT", "/global/2", b"one more")[0] == 413
    assert answer(port, "GET", "/global/1") == (200, bytes(TWO_RANKS_BYTES))


RANK = """
import os, socket, sys
import torch
from distributed.backends.make import make_backend
from distributed.topology import find_topology, rendezvous
backend = make_backend("horovod", find_topology(), torch.device("cpu"), timeout_s=60.0)
x = torch.ones(3)
backend.all_reduce_(x, "test.sum")
ranks = backend.all_gather_objects(backend.topology.rank)
# By now rank 0 has left its constructor. Is any process listening on the port?
open_ports = {line.split()[1].split(":")[1] for line in open("/proc/net/tcp") if line.split()[3] == "0A"}
print(f"{rendezvous()[1]:04X}" in open_ports, x.tolist(), ranks, flush=True)
backend.close()
"""


@pytest.mark.slow
def test_it_is_gone_when_all_ranks_have_started() -> None:
    available(World("horovodrun", 2))
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            cwd=CHECKOUT,
            env=os.environ | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=180)
        assert (rank.returncode, output.splitlines()[-1:]) == (0, ["False [2.0, 2.0, 2.0] [0, 1]"]), output

"""Horovod's Gloo rendezvous under plain srun: no MPI, no ssh, no horovodrun.

horovodrun serves a key-value store over HTTP and passes its address to every rank in the environment. Here rank 0 serves the
store, and each rank derives that environment from Slurm's. Horovod's client cannot prove who it is, so the store takes only
what Horovod sends, on the loopback interface if all ranks are on one node, and only until all ranks have started.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Callable

from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from distributed.addresses import rendezvous_address
from distributed.topology import Topology, TopologyError, tasks_of_nodes

# A value is the addresses of one rank for each other rank, 150 bytes each.
_VALUE_BYTES = 64 << 10
_VALUE_BYTES_PER_RANK = 1 << 10


class _Handler(RendezvousHandler):  # type: ignore[misc]  # horovod has no types
    def parse_request(self) -> bool:
        """Refuse all but GET, PUT and DELETE of a key. Horovod's handler also serves the files of the working folder."""
        if not super().parse_request():
            return False
        if self.command not in ("GET", "PUT", "DELETE") or re.fullmatch("/[^/]+/[^/]+", self.path) is None:
            self.send_error(400)
            return False
        length = self.headers.get("Content-Length", "0" if self.command != "PUT" else "")
        if re.fullmatch("[0-9]{1,9}", length) is None or int(length) > self.server.room(self.path):
            self.send_error(413)
            return False
        return True


class _Server(RendezvousHTTPServer):  # type: ignore[misc]  # horovod has no types
    # All ranks connect at once; the default is 5.
    request_queue_size = 4096
    daemon_threads = True
    # The port of a job that was requeued to the same node still has old connections in TIME_WAIT.
    allow_reuse_address = True
    # Of the job.
    num_ranks = 1

    def room(self, path: str) -> int:
        """Return how many bytes the value of a key may have: a job's ranks need no more than this server's memory holds."""
        limit = _VALUE_BYTES + self.num_ranks * _VALUE_BYTES_PER_RANK
        with self.cache_lock:
            held = sum(len(value) for scope in self.cache.values() for value in scope.values())
        return min(limit, self.num_ranks * limit - held)


def prepare_gloo(topology: Topology, timeout_s: float) -> Callable[[], None]:
    """Set the environment that hvd.init() reads; on rank 0 serve the store, elsewhere wait for the store.

    Returns the function that stops it, to be called when all ranks have started: later Horovod does not use the store.
    Raises TopologyError when the port is in use, or the store does not answer within `timeout_s`.
    """
    address, port = rendezvous_address(topology)
    tasks_per_node = tasks_of_nodes(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    os.environ |= {
        "HOROVOD_RANK": str(topology.rank),
        "HOROVOD_SIZE": str(topology.size),
        "HOROVOD_LOCAL_RANK": str(topology.local_rank),
        "HOROVOD_LOCAL_SIZE": str(topology.local_size),
        # Rank and size among the processes with this local rank, one on each node that has enough processes.
        "HOROVOD_CROSS_RANK": str(sum(tasks > topology.local_rank for tasks in tasks_per_node[: topology.node])),
        "HOROVOD_CROSS_SIZE": str(sum(tasks > topology.local_rank for tasks in tasks_per_node)),
        "HOROVOD_HOSTNAME": _node_name(topology.node),
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": address,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
    }
    if topology.rank == 0:
        return _serve(address, port, tasks_per_node)
    _wait_for(address, port, topology, timeout_s)
    return lambda: None


def _node_name(node: int) -> str:
    """Return a unique name: Horovod's store distinguishes nodes by name only."""
    return f"node{node}"


def _serve(address: str, port: int, tasks_per_node: list[int]) -> Callable[[], None]:
    try:
        server = _Server((address, port), _Handler, False)
    except OSError as error:
        raise TopologyError(
            f"rank 0 cannot serve Horovod's rendezvous on {address}:{port}: {error.strerror}. Fix: MASTER_PORT=ANOTHER"
        ) from None
    hosts = [HostInfo(_node_name(node), tasks) for node, tasks in enumerate(tasks_per_node)]
    server.num_ranks = sum(tasks_per_node)
    server.init(get_host_assignments(hosts, server.num_ranks))
    threading.Thread(target=server.serve_forever, args=(0.1,), name="rendezvous", daemon=True).start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop


def _wait_for(address: str, port: int, topology: Topology, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise TopologyError(
                    f"rank {topology.rank} on {topology.host} waited {timeout_s:.0f} s for rank 0 at {address}:{port}: {error}. "
                    "Fix: find out why rank 0 does not start; open the port between nodes, or MASTER_PORT=ANOTHER"
                ) from None
            time.sleep(0.2)

"""How Horovod's ranks find each other under plain srun: no MPI, no ssh, no horovodrun.

horovodrun would serve a key-value store over HTTP and tell every rank of it in the environment. Here rank 0 serves it, and the
environment follows from Slurm's.
"""

import os
import socket
import threading
import time

from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from distributed.topology import Topology, TopologyError, rendezvous, tasks_of_nodes


class _Server(RendezvousHTTPServer):  # type: ignore[misc]  # horovod has no types
    request_queue_size = 4096  # all ranks come at once; the default is 5
    daemon_threads = True
    allow_reuse_address = True  # a job that was requeued to the same node finds its old connections there


def prepare_gloo(topology: Topology, timeout_s: float) -> RendezvousHTTPServer | None:
    """Set what hvd.init() reads; on rank 0 serve the store until its `shutdown()`, elsewhere wait until it is there.

    Raises TopologyError when the port is taken, or nobody answers within `timeout_s`.
    """
    host, port = rendezvous()
    address = _look_up(host, topology)
    tasks_per_node = tasks_of_nodes(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    os.environ |= {
        "HOROVOD_RANK": str(topology.rank),
        "HOROVOD_SIZE": str(topology.size),
        "HOROVOD_LOCAL_RANK": str(topology.local_rank),
        "HOROVOD_LOCAL_SIZE": str(topology.local_size),
        # Among the ranks of this local rank, one on each node that has so many.
        "HOROVOD_CROSS_RANK": str(sum(tasks > topology.local_rank for tasks in tasks_per_node[: topology.node])),
        "HOROVOD_CROSS_SIZE": str(sum(tasks > topology.local_rank for tasks in tasks_per_node)),
        "HOROVOD_HOSTNAME": _node_name(topology.node),
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": address,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
    }
    if topology.rank == 0:
        return _serve(address, port, tasks_per_node)
    _wait_for(address, port, topology, timeout_s)
    return None


def _node_name(node: int) -> str:
    """Horovod's store tells nodes apart by name alone."""
    return f"node{node}"


def _look_up(host: str, topology: Topology) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise TopologyError(
            f"rank {topology.rank} on {topology.host} cannot look up {host}, where rank 0 is: {error}. "
            "Fix: MASTER_ADDR=ADDRESS for all tasks"
        ) from None


def _serve(address: str, port: int, tasks_per_node: list[int]) -> RendezvousHTTPServer:
    try:
        server = _Server((address, port), RendezvousHandler, False)
    except OSError as error:
        raise TopologyError(
            f"rank 0 cannot serve Horovod's rendezvous on {address}:{port}: {error.strerror}. Fix: MASTER_PORT=ANOTHER"
        ) from None
    hosts = [HostInfo(_node_name(node), tasks) for node, tasks in enumerate(tasks_per_node)]
    server.init(get_host_assignments(hosts, sum(tasks_per_node)))
    threading.Thread(target=server.serve_forever, name="rendezvous", daemon=True).start()
    return server


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
                    "Fix: see why rank 0 does not start; open the port between nodes, or MASTER_PORT=ANOTHER"
                ) from None
            time.sleep(0.2)

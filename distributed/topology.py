"""Who am I among the processes of this job? Read from any launcher's environment, and refused where it contradicts itself.

Imports without torch.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass


class TopologyError(ValueError):
    """The launcher's environment and the wish for a world contradict each other; the message says how to start the job."""


@dataclass(frozen=True)
class Topology:
    """A process' place in the world. `local_*` count within its node; `node` numbers the nodes from 0."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    node: int
    host: str
    job_id: str | None = None


@dataclass(frozen=True)
class _Launcher:
    """Names of the variables in which a launcher tells rank, size, local rank, local size and node."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    node: str | None


_LAUNCHERS = (
    _Launcher(
        "horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "HOROVOD_CROSS_RANK"
    ),
    _Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        None,
    ),
    _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
)


def find_topology(environ: Mapping[str, str] = os.environ) -> Topology:
    """This process' place, from the environment of torchrun, horovodrun (Gloo or MPI), mpirun, or none of them.

    Raises TopologyError for variables that are incomplete, out of range or of two launchers that disagree.
    """
    found = [
        _read(launcher, environ) for launcher in _LAUNCHERS if launcher.rank in environ or launcher.size in environ
    ]
    for other in found[1:]:
        if (other.rank, other.size) != (found[0].rank, found[0].size):
            raise TopologyError(
                f"{found[0].launcher} says rank {found[0].rank} of {found[0].size}, {other.launcher} says rank {other.rank} of "
                f"{other.size}. Fix: start the job with one launcher, from a shell that was not started by another"
            )
    if found:
        return found[0]
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise TopologyError(
            f"srun started {tasks} tasks, but told them nothing of each other. Fix: start torchrun or mpirun inside the allocation"
        )
    return Topology("none", 0, 1, 0, 1, 0, socket.gethostname())


def _read(launcher: _Launcher, environ: Mapping[str, str]) -> Topology:
    def number(name: str | None, default: int | None = None) -> int:
        if name is None or name not in environ:
            if default is None:
                raise TopologyError(
                    f"{launcher.name}'s {launcher.rank} or {launcher.size} is set, but {name} is not. "
                    f"Fix: start the job with {launcher.name}, or unset these variables"
                )
            return default
        try:
            return int(environ[name])
        except ValueError:
            raise TopologyError(
                f"{name}={environ[name]!r} is not a number. Fix: start the job with {launcher.name}"
            ) from None

    rank, size = number(launcher.rank), number(launcher.size)
    local_rank, local_size = number(launcher.local_rank), number(launcher.local_size)
    node = number(launcher.node, default=rank // max(1, local_size))
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise TopologyError(
            f"{launcher.name} says rank {rank} of {size} and local rank {local_rank} of {local_size}, which cannot be. "
            f"Fix: start the job with {launcher.name} instead of setting these variables by hand"
        )
    # torchrun's own run id is no job: --standalone makes a random one.
    return Topology(
        launcher.name, rank, size, local_rank, local_size, node, socket.gethostname(), environ.get("SLURM_JOB_ID")
    )


def choose_backend(wanted: str, topology: Topology, world_size: int | None = None) -> str:
    """`single`, `torch` or `horovod`: what the configuration wants, checked against the launcher.

    Raises TopologyError when the world is not `world_size`, or the launcher cannot start the backend.
    """
    if world_size is not None and topology.size != world_size:
        raise TopologyError(
            f"distributed.world_size={world_size}, but {_started(topology)}. Fix: start {world_size} processes, or drop the key"
        )
    natural = {"none": "single", "torchrun": "torch", "horovodrun": "horovod", "mpirun": "horovod"}[topology.launcher]
    if wanted == "auto":
        return natural
    if wanted == "single" and topology.size > 1:
        raise TopologyError(
            f"distributed.backend=single, but {_started(topology)}. Fix: distributed.backend={natural}, or start one process"
        )
    if wanted == "torch" and topology.launcher in ("horovodrun", "mpirun"):
        raise TopologyError(
            f"distributed.backend=torch needs torchrun's rendezvous, but {_started(topology)}. "
            "Fix: start with torchrun, or distributed.backend=horovod"
        )
    if wanted == "horovod" and topology.launcher == "torchrun" and topology.size > 1:
        raise TopologyError(
            f"distributed.backend=horovod, but {_started(topology)}, which Horovod does not know. "
            "Fix: start with horovodrun or mpirun, or distributed.backend=torch"
        )
    return wanted


def _started(topology: Topology) -> str:
    launcher = "no launcher" if topology.launcher == "none" else topology.launcher
    return f"{launcher} started {topology.size} process{'es' if topology.size > 1 else ''}"

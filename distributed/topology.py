"""The place of this process in its job: rank, size and node, from any launcher's environment. Contradictions are refused.

Imports without torch.
"""

import itertools
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


class TopologyError(ValueError):
    """A contradiction between the launcher's environment and the configured world; the message says how to start the job."""


@dataclass(frozen=True)
class Topology:
    """A process' place in the world. `local_*` count within its node; `node` counts nodes from 0.

    `launcher`: none, local (launch/local.py), torchrun, horovodrun, mpirun, jsrun, srun, or srun --mpi=pmix or --mpi=pmi2, whose
    tasks may join MPI.
    """

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
    """Names of the variables in which a launcher passes rank, size, local rank, local size and node."""

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
    _Launcher("local", "TSM_LOCAL_RANK", "TSM_LOCAL_SIZE", "TSM_LOCAL_RANK", "TSM_LOCAL_SIZE", None),
    _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
)
# LSF's launcher on machines like Summit. Its MPI also sets Open MPI's variables, so mpirun's names are not read there.
_JSRUN = _Launcher(
    "jsrun",
    "JSM_NAMESPACE_RANK",
    "JSM_NAMESPACE_SIZE",
    "JSM_NAMESPACE_LOCAL_RANK",
    "JSM_NAMESPACE_LOCAL_SIZE",
    None,
)


def find_topology(environ: Mapping[str, str] = os.environ) -> Topology:
    """Return this process' place, from the environment of the launcher that started it, if any.

    Where srun starts another launcher once on each node, that launcher's variables take precedence.

    Raises TopologyError for variables that are incomplete, out of range or of two launchers that disagree.
    """
    if _JSRUN.rank in environ or _JSRUN.size in environ:
        return _read(_JSRUN, environ)
    found = [
        _read(launcher, environ) for launcher in _LAUNCHERS if launcher.rank in environ or launcher.size in environ
    ]
    for other in found[1:]:
        if (other.rank, other.size) != (found[0].rank, found[0].size):
            raise TopologyError(
                f"{found[0].launcher} says rank {found[0].rank} of {found[0].size}, {other.launcher} says rank {other.rank} of "
                f"{other.size}. Fix: start the job with one launcher, from a shell that no other launcher started"
            )
    if found:
        return found[0]
    # A batch script has no such variable, and an interactive shell has one task.
    if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _read_srun(environ)
    # The only task of an srun step, as in a sweep, owns its Slurm job; a process in a shell inside an allocation may not.
    job_id = environ.get("SLURM_JOB_ID") if "SLURM_STEP_NUM_TASKS" in environ else None
    return Topology("none", 0, 1, 0, 1, 0, socket.gethostname(), job_id)


def _read_srun(environ: Mapping[str, str]) -> Topology:
    launcher = "srun"
    for variable, flag in (("PMIX_RANK", "pmix"), ("PMI_RANK", "pmi2")):
        if variable in environ:
            launcher = f"srun --mpi={flag}"
    node = _srun_number("SLURM_NODEID", environ)
    tasks_per_node = tasks_of_nodes(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if sum(tasks_per_node) != _srun_number("SLURM_STEP_NUM_TASKS", environ) or not 0 <= node < len(tasks_per_node):
        raise TopologyError(
            f"srun says {environ['SLURM_STEP_NUM_TASKS']} tasks, SLURM_STEP_TASKS_PER_NODE="
            f"{environ.get('SLURM_STEP_TASKS_PER_NODE')!r} and node {node}, which is impossible. "
            "Fix: start the job with srun instead of setting these variables by hand"
        )
    rank, local_rank = _srun_number("SLURM_PROCID", environ), _srun_number("SLURM_LOCALID", environ)
    place = Topology(
        launcher,
        rank,
        sum(tasks_per_node),
        local_rank,
        tasks_per_node[node],
        node,
        socket.gethostname(),
        _job_id(environ),
    )
    return _checked(place)


def _srun_number(name: str, environ: Mapping[str, str]) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        raise TopologyError(
            f"srun started this process, but {name}={environ.get(name)!r} is not a number. "
            "Fix: keep Slurm's variables (srun --export=ALL; pass them into a container)"
        ) from None


def tasks_of_nodes(text: str) -> list[int]:
    """Expand Slurm's list of tasks per node, `2(x3),1`, to [2, 2, 2, 1]; return [] for any other text."""
    if re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text) is None:
        return []
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def hosts_of(node_list: str) -> Iterator[str]:
    """Yield the hosts of Slurm's node list, as `scontrol show hostnames`: `r1n[03-04,7]` -> r1n03, r1n04, r1n7."""
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        text_and_numbers = re.split(r"\[([^\]]*)\]", part)
        choices = [_expanded(piece) if i % 2 else [piece] for i, piece in enumerate(text_and_numbers)]
        yield from map("".join, itertools.product(*choices))


def _expanded(numbers: str) -> list[str]:
    """Expand Slurm's `003-005,12` to 003, 004, 005, 12."""
    found = []
    for part in numbers.split(","):
        first, _, last = part.partition("-")
        found += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return found


def rendezvous(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return the (host, port) of rank 0 for the tasks of srun: Slurm passes no such address.

    Task 0 runs on the first node of the step. The port is derived from job and step, so that two jobs on a node do not collide,
    and is below the kernel's ephemeral ports. MASTER_ADDR and MASTER_PORT, as for torchrun, override both.
    """
    host = environ.get("MASTER_ADDR") or next(hosts_of(environ.get("SLURM_STEP_NODELIST", "")), None)
    job, step = int(environ.get("SLURM_JOB_ID", 0)), int(environ.get("SLURM_STEP_ID", 0))
    port = environ.get("MASTER_PORT") or str(20_000 + (7 * job + step) % 10_000)
    if not host or not port.isdecimal():
        raise TopologyError(
            f"no address for rank 0: SLURM_STEP_NODELIST={environ.get('SLURM_STEP_NODELIST')!r}, MASTER_PORT={port!r}. "
            "Fix: start with srun, or set MASTER_ADDR and MASTER_PORT for all tasks"
        )
    return host, int(port)


def _job_id(environ: Mapping[str, str]) -> str | None:
    return environ.get("SLURM_JOB_ID") or environ.get("LSB_JOBID")


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
    # torchrun's run id is not a job id: --standalone makes a random one.
    return _checked(
        Topology(launcher.name, rank, size, local_rank, local_size, node, socket.gethostname(), _job_id(environ))
    )


def _checked(place: Topology) -> Topology:
    rank, size, local_rank, local_size = place.rank, place.size, place.local_rank, place.local_size
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise TopologyError(
            f"{place.launcher} says rank {rank} of {size} and local rank {local_rank} of {local_size}, which is impossible. "
            f"Fix: start the job with {place.launcher} instead of setting these variables by hand"
        )
    return place


def choose_backend(wanted: str, topology: Topology, world_size: int | None = None) -> str:
    """Return `single`, `torch` or `horovod`: the configured backend, checked against the launcher.

    Raises TopologyError when the world's size is not `world_size`, or the launcher cannot start the backend.
    """
    if world_size is not None and topology.size != world_size:
        raise TopologyError(
            f"distributed.world_size={world_size}, but {_started(topology)}. Fix: start {world_size} processes, or drop the key"
        )
    default = _DEFAULT_BACKEND[topology.launcher]
    if wanted == "auto":
        return default
    if wanted == "single" and topology.size > 1:
        raise TopologyError(
            f"distributed.backend=single, but {_started(topology)}. Fix: distributed.backend={default}, or start one process"
        )
    if wanted == "torch" and topology.launcher in ("horovodrun", "mpirun", "jsrun"):
        raise TopologyError(
            f"distributed.backend=torch needs the rendezvous of launch/local.py, torchrun or srun, but "
            f"{_started(topology)}. Fix: start with one of them, or distributed.backend=horovod"
        )
    if wanted == "horovod" and topology.launcher in ("local", "torchrun") and topology.size > 1:
        raise TopologyError(
            f"distributed.backend=horovod, but {_started(topology)}, which Horovod does not support. "
            "Fix: start with srun, horovodrun or mpirun, or distributed.backend=torch"
        )
    return wanted


_DEFAULT_BACKEND = {
    "none": "single",
    "local": "torch",
    "torchrun": "torch",
    "srun": "torch",
    "srun --mpi=pmix": "horovod",
    "srun --mpi=pmi2": "horovod",
    "horovodrun": "horovod",
    "mpirun": "horovod",
    "jsrun": "horovod",
}


def choose_controller(wanted: str, topology: Topology) -> str | None:
    """Return Horovod's controller, `mpi` or `gloo`; None where the launcher tells Horovod.

    Raises TopologyError when the launcher does not support the configured controller.
    """
    supported = {
        "srun": ("gloo",),
        "srun --mpi=pmix": ("mpi", "gloo"),
        "srun --mpi=pmi2": ("mpi", "gloo"),
        "mpirun": ("mpi",),
        "jsrun": ("mpi",),
    }.get(topology.launcher)
    if supported is None:
        return None
    if wanted == "auto":
        return supported[0] if topology.launcher.startswith("srun") else None
    if wanted not in supported:
        fix = "srun --mpi=pmix" if wanted == "mpi" else "srun, or horovodrun --gloo"
        raise TopologyError(
            f"distributed.controller={wanted}, but {_started(topology)}. Fix: start with {fix}, or distributed.controller=auto"
        )
    return wanted


def choose_gpu(num_visible: int, topology: Topology) -> int:
    """Return the index of this process' GPU among those that it sees.

    A Slurm task sees all GPUs of its node (--gres, or no binding), or only its own (--gpus-per-task). The local rank is the
    index in the first case only.
    """
    if num_visible == 0:
        raise TopologyError(
            "distributed.device=cuda, but torch sees no GPU. Fix: distributed.device=cpu, or request GPUs"
        )
    if 1 < num_visible < topology.local_size:
        raise TopologyError(
            f"{topology.local_size} processes on {topology.host} see {num_visible} GPUs. "
            f"Fix: start {num_visible} processes on each node"
        )
    return topology.local_rank if num_visible > 1 else 0


def _started(topology: Topology) -> str:
    launcher = "no launcher" if topology.launcher == "none" else topology.launcher
    return f"{launcher} started {topology.size} process{'es' if topology.size > 1 else ''}"

"""Find the faults of single nodes: ranks, failed checks, clocks, disks, versions, GPUs."""

import re
from collections import Counter
from collections.abc import Sequence

from .node import CHECKS
from .reports import EXCLUDE_AND_REPAIR, Expected, Judgement, Reports

# The semaphores of a rank's loader workers, and a little for MPI.
_LEAST_SHARED_MIB_PER_RANK = 2

# About the batches that a rank's workers prefetch, with the published settings, and NCCL's buffers.
_USUAL_SHARED_MIB_PER_RANK = 256


def unreachable_nodes(reports: Reports, expected: Expected, found: Judgement) -> set[str]:
    """Find the nodes on which srun could not start a task."""
    named = {name for line in reports.others for name in re.findall(r"srun: error: .*failed on node (\S+?):", line)}
    unreachable = named & set(expected.nodes)
    for node in unreachable:
        found.bad[node].append(f"srun cannot start a task on it. Fix: {EXCLUDE_AND_REPAIR}")
    return unreachable


def judge_ranks(reports: Reports, expected: Expected, found: Judgement, complete: bool) -> None:
    """Compare each task's rank and world size with Slurm's. `complete`: every node reported."""
    for each in reports.of("place"):
        if "error" in each:
            found.bad[each["host"]].append(f"a rank does not know its place: {each['error']}")
        elif each["size"] != expected.tasks:
            found.bad[each["host"]].append(
                f"rank {each['rank']} has world size {each['size']}, Slurm has {expected.tasks} tasks. "
                "Fix: srun's --mpi and the launcher's variables"
            )
    ranks = Counter(each["rank"] for each in reports.of("place") if "error" not in each)
    twice = [rank for rank, times in ranks.items() if times > 1]
    missing = sorted(set(range(expected.tasks)) - set(ranks))
    if twice:
        found.no_single_node.append(f"ranks {_some(sorted(twice))} exist more than once. Fix: srun's --mpi")
    if missing and complete and not found.bad:
        found.no_single_node.append(
            f"ranks {_some(missing)} of {expected.tasks} did not answer. Fix: read srun's messages above"
        )


def _some(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def judge_answers(reports: Reports, node: str, found: Judgement) -> None:
    """Find the checks that failed on a node, and the first check that never ended."""
    for kind in CHECKS:
        of_node = [each for each in reports.of(kind) if each["host"] == node]
        if not of_node:
            found.bad[node].append(f"hangs in the check of its {kind}. Fix: {EXCLUDE_AND_REPAIR}")
            return
        if "error" in of_node[0]:
            error = of_node[0]["error"]
            fix = {"disk": "free or repair it, or set TSM_LOCAL_DISK"}.get(kind, EXCLUDE_AND_REPAIR)
            found.bad[node].append(f"{kind}: {error}" + ("" if "Fix: " in error else f". Fix: {fix}"))


def judge_clocks(reports: Reports, expected: Expected, found: Judgement) -> None:
    """Compare each clock with the one that most clocks agree with.

    Offsets are relative to the first node, whose own clock may be the wrong one.
    """
    clocks = reports.by_node("clock")
    offsets_s = {node: clock["offset_s"] for node, clock in clocks.items()}
    agreeing = {
        node: sum(abs(own_s - other_s) <= expected.max_clock_skew_s for other_s in offsets_s.values())
        for node, own_s in offsets_s.items()
    }
    if not agreeing:
        return
    first = next((node for node in expected.nodes if node in agreeing), "")
    reference_s = offsets_s[max(agreeing, key=lambda node: (agreeing[node], node == first))]
    for node, clock in clocks.items():
        ahead_s = clock["offset_s"] - reference_s
        if abs(ahead_s) - clock["round_trip_s"] / 2 > expected.max_clock_skew_s:
            direction = "ahead of" if ahead_s > 0 else "behind"
            found.bad[node].append(
                f"its clock is {abs(ahead_s):.1f} s {direction} the others' (at most {expected.max_clock_skew_s:g} s). "
                "Fix: time service (chronyc tracking)"
            )


def judge_disks(reports: Reports, expected: Expected, found: Judgement) -> None:
    """Compare each local disk's free space with the minimum."""
    for node, disk in reports.by_node("disk").items():
        if disk["free_gib"] < expected.min_free_gib:
            found.bad[node].append(
                f"{expected.local_disk} has {disk['free_gib']:.1f} GiB free, {expected.min_free_gib:g} GiB are required. "
                "Fix: free some, or set TSM_LOCAL_DISK"
            )


def judge_environments(reports: Reports, expected: Expected, found: Judgement) -> None:
    """Judge each node's shared memory by its ranks, and pass on the notes."""
    ranks = Counter(each["host"] for each in reports.of("place"))
    for node, each in reports.by_node("environment").items():
        found.notes.extend(f"{node}: {note}" for note in each["notes"])
        shared = (
            f"/dev/shm has {each['shared_free_mib']:.0f} of {each['shared_mib']:.0f} MiB free for {ranks[node]} ranks"
        )
        if each["shared_free_mib"] < _LEAST_SHARED_MIB_PER_RANK * ranks[node]:
            found.bad[node].append(
                f"shared memory: {shared}. Fix: the container's --shm-size, or remove old files in /dev/shm"
            )
        elif each["shared_free_mib"] < _USUAL_SHARED_MIB_PER_RANK * ranks[node]:
            found.notes.append(
                f"{node}: shared memory: {shared}; batches that do not fit go through pipes, which takes more time. "
                "Fix: the container's --shm-size"
            )


def judge_versions(reports: Reports, expected: Expected, found: Judgement) -> None:
    """Compare each version with the most frequent one; on a tie with the earlier node's."""
    reported = reports.by_node("versions")
    versions = {node: reported[node]["versions"] for node in expected.nodes if node in reported}
    for what in sorted({what for each in versions.values() for what in each}):
        by_node = {node: each.get(what, "none") for node, each in versions.items()}
        _judge_equal(what, by_node, "the same environment on all nodes (PYTHONPATH, modules, staging)", found)
    drivers = {gpu["host"]: gpu["driver"] for gpu in reports.of("gpu")}
    _judge_equal("driver", drivers, "the same driver on all nodes", found)


def _judge_equal(what: str, by_node: dict[str, str], fix: str, found: Judgement) -> None:
    counts = Counter(by_node.values())
    usual = max(counts, key=lambda version: counts[version], default="")
    for node, own in by_node.items():
        if own != usual:
            found.bad[node].append(f"has {what} {own}, the others {usual}. Fix: {fix}")


def judge_gpus(reports: Reports, expected: Expected, found: Judgement) -> None:
    """Check the number and the health of GPUs, and note ranks whose cores are far from their GPU."""
    for node, gpus in reports.by_node("gpus").items():
        if gpus["count"] != expected.gpus:
            found.bad[node].append(f"has {gpus['count']} GPUs, {expected.gpus} are expected. Fix: {EXCLUDE_AND_REPAIR}")
    for gpu in reports.of("gpu"):
        faults = gpu_faults(gpu)
        if faults:
            found.bad[gpu["host"]].append(
                f"GPU {gpu['index']}: {', '.join(faults)}. Fix: reset it, or {EXCLUDE_AND_REPAIR}"
            )
    near = {(gpu["host"], int(gpu["index"])): gpu["cores"] for gpu in reports.of("gpu")}
    for place in reports.of("place"):
        where = (place["host"], place.get("local_rank"))
        if where in near and not is_near(place["cores"], near[where]):
            found.notes.append(
                f"{where[0]}: local rank {where[1]} runs on cores {place['cores']}, its GPU is near {near[where]}. "
                "Fix: TSM_CPU_BIND, --cpus-per-task"
            )


def gpu_faults(gpu: dict[str, str]) -> list[str]:
    """List the faults that nvidia-smi reports of a GPU. An unsupported field ([N/A]) is no fault."""
    faults = []
    if gpu.get("uncorrected", "").isdecimal() and int(gpu["uncorrected"]) > 0:
        faults.append(f"{gpu['uncorrected']} uncorrected memory errors")
    if "Yes" in (gpu.get("retired"), gpu.get("remap_pending")):
        faults.append("a memory repair is pending until the next reset")
    if gpu.get("remap_failure") == "Yes":
        faults.append("its memory could not be repaired")
    if gpu.get("slowdown") == "Active":
        faults.append("hardware slowdown is active (heat or power)")
    return faults


def is_near(cores: str, near: str) -> bool:
    """Return whether all of a task's cores are near its GPU; true if the kernel does not list the near ones."""
    return not near or _core_set(cores) <= _core_set(near)


def _core_set(text: str) -> set[int]:
    cores: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores

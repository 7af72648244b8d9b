"""Turns the reports of preflight's tasks, on stdin, into a table, the faults with their fixes, and an exit code.

The last line is for the shell: `bad-nodes: n3 n5`. Exit codes are in slurm/preflight.sh.
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .node import CHECKS
from .pairs import Floors, Measured, judge_pairs, slow_pairs, usual_mb_s

_HARDWARE = "leave it out, and have it repaired"
_SHOWN_OTHER_LINES = 40


@dataclass(frozen=True)
class Expected:
    """What the job asks of its nodes."""

    nodes: list[str]
    tasks: int
    gpus: int
    local_disk: str = "/tmp"
    min_free_gib: float = 0.0
    max_clock_skew_s: float = 1.0
    floors: Floors = field(default_factory=Floors)
    all_reduce: bool = True


@dataclass
class Judgement:
    """Faults by node; what is wrong without anyone to name; and what is only odd."""

    bad: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Each `what. Fix: how`."""
    nobody: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 2 if self.bad else 3 if self.nobody else 0


class Reports:
    """The reports, by what they are about."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._all: list[dict[str, Any]] = []
        self.others: list[str] = []
        """Lines that are no reports: what srun had to say."""
        for line in lines:
            try:
                self._all.append(json.loads(line))
                assert "preflight" in self._all[-1]
            except (ValueError, AssertionError, TypeError):
                self.others.append(line)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self._all if each["preflight"] == kind]

    def by_node(self, kind: str) -> dict[str, dict[str, Any]]:
        """The ones without an error."""
        return {each["host"]: each for each in self.of(kind) if "error" not in each}


def judge(reports: Reports, expected: Expected) -> Judgement:
    """All faults. Nodes that srun could not reach are named for that alone."""
    found = Judgement()
    unreachable = {
        name for line in reports.others for name in re.findall(r"srun: error: .*failed on node (\S+?):", line)
    } & set(expected.nodes)
    for node in unreachable:
        found.bad[node].append(f"srun cannot start a task on it. Fix: {_HARDWARE}")
    answered = {each["host"] for each in reports.of("place")}
    for node in expected.nodes:
        if node not in answered and not unreachable:
            found.bad[node].append(f"did not answer. Fix: {_HARDWARE}")
    _judge_places(reports, expected, found, complete=answered == set(expected.nodes))
    for node in answered:
        _judge_answers(reports, node, found)
    _judge_clocks(reports, expected, found)
    _judge_disks(reports, expected, found)
    _judge_versions(reports, expected, found)
    if expected.gpus:
        _judge_gpus(reports, expected, found)
    if expected.all_reduce and not unreachable:
        _judge_network(reports, expected, found)
    for each in reports.of("unfinished"):
        if not found.bad and not found.nobody:
            found.nobody.append(
                f"the first checks ended with {each['code']}, with no node at fault. Fix: TSM_PREFLIGHT_LIMIT_S, srun's words above"
            )
    return found


def _judge_places(reports: Reports, expected: Expected, found: Judgement, complete: bool) -> None:
    for each in reports.of("place"):
        if "error" in each:
            found.bad[each["host"]].append(f"a rank does not know its place: {each['error']}")
        elif each["size"] != expected.tasks:
            found.bad[each["host"]].append(
                f"rank {each['rank']} believes in {each['size']} ranks, Slurm has {expected.tasks}. "
                "Fix: srun's --mpi and the launcher's variables"
            )
    ranks = Counter(each["rank"] for each in reports.of("place") if "error" not in each)
    twice = [rank for rank, times in ranks.items() if times > 1]
    missing = sorted(set(range(expected.tasks)) - set(ranks))
    if twice:
        found.nobody.append(f"ranks {_some(sorted(twice))} are there more than once. Fix: srun's --mpi")
    if missing and complete and not found.bad:
        found.nobody.append(
            f"ranks {_some(missing)} of {expected.tasks} did not answer. Fix: read what srun says above"
        )


def _judge_answers(reports: Reports, node: str, found: Judgement) -> None:
    """Errors of checks; and a check that a node began and never ended."""
    for kind in CHECKS:
        of_node = [each for each in reports.of(kind) if each["host"] == node]
        if not of_node:
            found.bad[node].append(f"hangs in the check of its {kind}. Fix: {_HARDWARE}")
            return
        if "error" in of_node[0]:
            how = {"disk": "free or mend it, or set TSM_LOCAL_DISK"}.get(kind, _HARDWARE)
            found.bad[node].append(f"{kind}: {of_node[0]['error']}. Fix: {how}")


def _judge_clocks(reports: Reports, expected: Expected, found: Judgement) -> None:
    """Against the time that most nodes agree on: the first node, whose clock they are compared with, may be the wrong one."""
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


def _judge_disks(reports: Reports, expected: Expected, found: Judgement) -> None:
    for node, disk in reports.by_node("disk").items():
        if disk["free_gib"] < expected.min_free_gib:
            found.bad[node].append(
                f"{expected.local_disk} has {disk['free_gib']:.1f} GiB free, {expected.min_free_gib:g} are asked for. "
                "Fix: free some, or set TSM_LOCAL_DISK"
            )


def _judge_versions(reports: Reports, expected: Expected, found: Judgement) -> None:
    """Against what most nodes have; the earlier node where they are as many."""
    reported = reports.by_node("versions")
    versions = {node: reported[node]["versions"] for node in expected.nodes if node in reported}
    for what in sorted({what for each in versions.values() for what in each}):
        have = {node: each.get(what, "none") for node, each in versions.items()}
        how = "the same environment on all nodes (PYTHONPATH, modules, staging)"
        _judge_equal(what, have, how, found)
    drivers = {gpu["host"]: gpu["driver"] for gpu in reports.of("gpu")}
    _judge_equal("driver", drivers, "the same driver on all nodes", found)


def _judge_equal(what: str, have: dict[str, str], how: str, found: Judgement) -> None:
    counts = Counter(have.values())
    usual = max(counts, key=lambda version: counts[version], default="")
    for node, own in have.items():
        if own != usual:
            found.bad[node].append(f"has {what} {own}, the others {usual}. Fix: {how}")


def _judge_gpus(reports: Reports, expected: Expected, found: Judgement) -> None:
    for node, gpus in reports.by_node("gpus").items():
        if gpus["count"] != expected.gpus:
            found.bad[node].append(f"has {gpus['count']} GPUs, {expected.gpus} are expected. Fix: {_HARDWARE}")
    for gpu in reports.of("gpu"):
        faults = gpu_faults(gpu)
        if faults:
            found.bad[gpu["host"]].append(f"GPU {gpu['index']}: {', '.join(faults)}. Fix: reset it, or {_HARDWARE}")
    near = {(gpu["host"], int(gpu["index"])): gpu["cores"] for gpu in reports.of("gpu")}
    for place in reports.of("place"):
        where = (place["host"], place.get("local_rank"))
        if where in near and not is_near(place["cores"], near[where]):
            found.notes.append(
                f"{where[0]}: local rank {where[1]} runs on cores {place['cores']}, its GPU is near {near[where]}. "
                "Fix: TSM_CPU_BIND, --cpus-per-task"
            )


def gpu_faults(gpu: dict[str, str]) -> list[str]:
    """What nvidia-smi says that a GPU should not be trained on for. Fields that it does not support say so, and are no fault."""
    faults = []
    if gpu.get("uncorrected", "").isdecimal() and int(gpu["uncorrected"]) > 0:
        faults.append(f"{gpu['uncorrected']} uncorrected memory errors")
    if "Yes" in (gpu.get("retired"), gpu.get("remap_pending")):
        faults.append("memory waits to be repaired at the next reset")
    if gpu.get("remap_failure") == "Yes":
        faults.append("its memory could not be repaired")
    if gpu.get("slowdown") == "Active":
        faults.append("the hardware slows itself down (heat or power)")
    return faults


def is_near(cores: str, near: str) -> bool:
    """Are all of a task's cores among those near its GPU? Yes where the kernel does not say which are."""
    return not near or _core_set(cores) <= _core_set(near)


def _core_set(text: str) -> set[int]:
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _judge_network(reports: Reports, expected: Expected, found: Judgement) -> None:
    joined = {each["node"] for each in reports.of("joined")}
    errors = [
        f"{each['host']}: all-reduce {' and '.join(each['nodes'])}: {each['error']}" for each in reports.of("failed")
    ]
    found.notes += errors
    if not joined:
        found.nobody.append("the all-reduce did not start. Fix: read what its tasks say above")
        return
    for node in set(expected.nodes) - joined - set(found.bad):
        found.bad[node].append(f"did not come to the all-reduce. Fix: network and torch on it, or {_HARDWARE}")
    for each in reports.of("no-cuda"):
        found.bad[each["node"]].append(f"torch sees no GPU there, but on others. Fix: driver and CUDA, or {_HARDWARE}")
    measured = measured_pairs(reports)
    verdict = judge_pairs(measured, expected.floors)
    for node in verdict.slow:
        best = max((each for each in measured if node in each.nodes), key=lambda each: each.mb_s)
        found.bad[node].append(
            f"all-reduce with any other node: {_speed(best)}, where {usual_mb_s(measured):.0f} MB/s are usual. "
            f"Fix: its network, or {_HARDWARE}"
        )
    if verdict.undecided:
        found.nobody.append(
            f"{', '.join(verdict.undecided)}: all-reduce is slow, and no other node to tell whose fault it is. "
            "Fix: TSM_MIN_ALL_REDUCE_MB_S, TSM_MAX_LATENCY_US, TSM_NETWORK_INTERFACE"
        )
    for pair in sorted(slow_pairs(measured, expected.floors)):
        if not set(pair) & {*verdict.slow, *verdict.undecided}:
            found.notes.append(f"{pair[0]} and {pair[1]} are slow with each other alone. Fix: cable or switch between")
    world = reports.of("world")
    if world and world[0]["mb_s"] < expected.floors.min_mb_s and not found.bad and not verdict.undecided:
        found.nobody.append(
            f"over all nodes: {world[0]['mb_s']:.0f} MB/s, below {expected.floors.min_mb_s:g}, though no pair is. "
            "Fix: TSM_MIN_ALL_REDUCE_MB_S, or the switches between"
        )
    if not reports.of("over") or (errors and not found.bad and not found.nobody):
        said = f": {errors[0]}" if errors else ""
        found.nobody.append(
            f"the all-reduce did not come to its end{said}. Fix: TSM_PREFLIGHT_LIMIT_S, NCCL_DEBUG=INFO"
        )


def measured_pairs(reports: Reports) -> list[Measured]:
    return [
        Measured((each["nodes"][0], each["nodes"][1]), each["mb_s"], each["latency_us"]) for each in reports.of("pair")
    ]


def _speed(pair: Measured) -> str:
    return f"{pair.mb_s:.1f} MB/s and {pair.latency_us:.0f} us at best" if pair.mb_s else "it fails"


def _some(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


# -------------------------------------------------------------------------------------------------------------------- output


def table(reports: Reports, expected: Expected, found: Judgement) -> list[str]:
    """A line for each node: what was measured on it, `-` where nothing was."""
    clocks, disks, gpus = (reports.by_node(kind) for kind in ("clock", "disk", "gpus"))
    pairs = measured_pairs(reports)
    rows = [("node", "GPUs", "clock ms", "disk free GiB", "write MB/s", "all-reduce MB/s", "latency us", "")]
    for node in expected.nodes:
        own = [pair for pair in pairs if node in pair.nodes]
        carried = [pair for pair in own if pair.mb_s > 0]
        rows.append(
            (
                node,
                str(gpus[node]["count"]) if node in gpus and expected.gpus else "-",
                f"{1000 * clocks[node]['offset_s']:+.1f}" if node in clocks else "-",
                f"{disks[node]['free_gib']:.1f}" if node in disks else "-",
                f"{disks[node]['write_mb_s']:.0f}" if node in disks else "-",
                f"{max(pair.mb_s for pair in own):.0f}" if own else "-",
                f"{min(pair.latency_us for pair in carried):.0f}" if carried else "-",
                "BAD" if node in found.bad else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for world in reports.of("world"):
        lines.append(f"all-reduce over all {world['ranks']}: {world['mb_s']:.0f} MB/s, {world['latency_us']:.0f} us")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", required=True, help="names, separated by commas")
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--local-disk", required=True)
    parser.add_argument("--min-free-gib", type=float, required=True)
    parser.add_argument("--max-clock-skew-s", type=float, required=True)
    parser.add_argument("--min-mb-s", type=float, required=True)
    parser.add_argument("--max-latency-us", type=float, required=True)
    parser.add_argument("--all-reduce", choices=("on", "off"), required=True)
    options = parser.parse_args()
    expected = Expected(
        options.nodes.split(","),
        options.tasks,
        options.gpus,
        options.local_disk,
        options.min_free_gib,
        options.max_clock_skew_s,
        Floors(options.min_mb_s, options.max_latency_us),
        options.all_reduce == "on",
    )
    reports = Reports(line for line in sys.stdin.read().splitlines() if line.strip())
    for line in reports.others[:_SHOWN_OTHER_LINES]:
        print(f"  {line}")
    if not reports.of("place"):
        print(f"preflight: no task answered on {options.nodes}; above is what srun says")
        return 4
    found = judge(reports, expected)
    print("\n".join(table(reports, expected, found)))
    for note in found.notes:
        print(f"NOTE {note}")
    for node in sorted(found.bad, key=expected.nodes.index):
        for what in found.bad[node]:
            print(f"BAD {node}: {what}")
    for what in found.nobody:
        print(f"BAD (no single node): {what}")
    if found.exit_code == 0:
        print(f"preflight: all is well on {len(expected.nodes)} nodes")
    print(f"bad-nodes: {' '.join(sorted(found.bad, key=expected.nodes.index))}")
    return found.exit_code


if __name__ == "__main__":
    sys.exit(main())

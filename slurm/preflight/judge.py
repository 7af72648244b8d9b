"""Turn the reports of preflight's tasks, on stdin, into a table, the faults with their fixes, and an exit code.

The last line is for the shell: `bad-nodes: n3 n5`. Exit codes are in slurm/preflight.sh.
"""

import argparse
import sys

from .network_faults import judge_network
from .node_faults import (
    judge_answers,
    judge_clocks,
    judge_disks,
    judge_environments,
    judge_gpus,
    judge_ranks,
    judge_versions,
    unreachable_nodes,
)
from .pairs import Floors
from .reports import EXCLUDE_AND_REPAIR, Expected, Judgement, Reports

_SHOWN_OTHER_LINES = 40


def judge(reports: Reports, expected: Expected) -> Judgement:
    """Find all faults. If srun could not reach a node, other nodes' missing answers and the all-reduce are not judged."""
    found = Judgement()
    unreachable = unreachable_nodes(reports, expected, found)
    answered = {each["host"] for each in reports.of("place")}
    for node in expected.nodes:
        if node not in answered and not unreachable:
            found.bad[node].append(f"did not answer. Fix: {EXCLUDE_AND_REPAIR}")
    judge_ranks(reports, expected, found, complete=answered == set(expected.nodes))
    for node in answered:
        judge_answers(reports, node, found)
    judge_clocks(reports, expected, found)
    judge_disks(reports, expected, found)
    judge_environments(reports, expected, found)
    judge_versions(reports, expected, found)
    if expected.gpus:
        judge_gpus(reports, expected, found)
    if expected.all_reduce and not unreachable:
        judge_network(reports, expected, found)
    for each in reports.of("unfinished"):
        if not found.any_fault:
            found.no_single_node.append(
                f"the node checks ended with exit code {each['code']}, with no node at fault. "
                "Fix: TSM_PREFLIGHT_LIMIT_S, srun's messages above"
            )
    return found


def table(reports: Reports, expected: Expected, found: Judgement) -> list[str]:
    """Format one line per node with its measurements, `-` where there is none."""
    clocks, disks, gpus = (reports.by_node(kind) for kind in ("clock", "disk", "gpus"))
    pairs = reports.pairs()
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


def print_faults(found: Judgement, nodes: list[str]) -> None:
    """Print notes and faults, and the line that slurm/preflight.sh reads."""
    bad = sorted(found.bad, key=nodes.index)
    for note in found.notes:
        print(f"NOTE {note}")
    for node in bad:
        for what in found.bad[node]:
            print(f"BAD {node}: {what}")
    for what in found.no_single_node:
        print(f"BAD (no single node): {what}")
    if found.exit_code == 0:
        print(f"preflight: all is well on {len(nodes)} nodes")
    print(f"bad-nodes: {' '.join(bad)}")


def read_arguments() -> Expected:
    """Read the command line."""
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
    return Expected(
        nodes=options.nodes.split(","),
        tasks=options.tasks,
        gpus=options.gpus,
        local_disk=options.local_disk,
        min_free_gib=options.min_free_gib,
        max_clock_skew_s=options.max_clock_skew_s,
        floors=Floors(options.min_mb_s, options.max_latency_us),
        all_reduce=options.all_reduce == "on",
    )


def main() -> int:
    """Judge the reports on stdin and return the exit code."""
    expected = read_arguments()
    reports = Reports(line for line in sys.stdin.read().splitlines() if line.strip())
    for line in reports.others[:_SHOWN_OTHER_LINES]:
        print(f"  {line}")
    if not reports.of("place"):
        print(f"preflight: no task answered on {','.join(expected.nodes)}; see srun's messages above")
        return 4
    found = judge(reports, expected)
    print("\n".join(table(reports, expected, found)))
    print_faults(found, expected.nodes)
    return found.exit_code


if __name__ == "__main__":
    sys.exit(main())

"""Find the faults between nodes, from the reports of the all-reduce."""

from .pairs import Measured, Verdict, judge_pairs, slow_pairs, usual_mb_s
from .reports import EXCLUDE_AND_REPAIR, Expected, Judgement, Reports


def judge_network(reports: Reports, expected: Expected, found: Judgement) -> None:
    """Find nodes that did not take part, nodes that are slow with every other, and an all-reduce that did not end."""
    errors = [
        f"{each['host']}: all-reduce {' and '.join(each['nodes'])}: {each['error']}" for each in reports.of("failed")
    ]
    found.notes += errors
    joined = {each["node"] for each in reports.of("joined")}
    if not joined:
        found.no_single_node.append("the all-reduce did not start. Fix: read its tasks' messages above")
        return
    for node in set(expected.nodes) - joined - set(found.bad):
        found.bad[node].append(f"did not join the all-reduce. Fix: its network and torch, or {EXCLUDE_AND_REPAIR}")
    for each in reports.of("no-cuda"):
        found.bad[each["node"]].append(
            f"torch finds no GPU on it, but does on others. Fix: driver and CUDA, or {EXCLUDE_AND_REPAIR}"
        )
    verdict = judge_pairs(reports.pairs(), expected.floors)
    _judge_speeds(reports.pairs(), verdict, expected, found)
    _judge_world(reports, verdict, expected, found)
    if not reports.of("over") or (errors and not found.any_fault):
        reason = f": {errors[0]}" if errors else ""
        found.no_single_node.append(
            f"the all-reduce did not finish{reason}. Fix: TSM_PREFLIGHT_LIMIT_S, NCCL_DEBUG=INFO"
        )


def _judge_speeds(measured: list[Measured], verdict: Verdict, expected: Expected, found: Judgement) -> None:
    """Name the nodes that are slow with every other, and note the pairs that are slow only with each other."""
    for node in verdict.slow:
        best = max((each for each in measured if node in each.nodes), key=lambda each: each.mb_s)
        found.bad[node].append(
            f"all-reduce with any other node: {_speed(best)}, where {usual_mb_s(measured):.0f} MB/s are usual. "
            f"Fix: its network, or {EXCLUDE_AND_REPAIR}"
        )
    if verdict.undecided:
        found.no_single_node.append(
            f"{', '.join(verdict.undecided)}: all-reduce is slow, and no fast node shows which of them is at fault. "
            "Fix: TSM_MIN_ALL_REDUCE_MB_S, TSM_MAX_LATENCY_US, TSM_NETWORK_INTERFACE"
        )
    for pair in sorted(slow_pairs(measured, expected.floors)):
        if not set(pair) & {*verdict.slow, *verdict.undecided}:
            found.notes.append(f"{pair[0]} and {pair[1]} are slow only with each other. Fix: cable or switch between")


def _judge_world(reports: Reports, verdict: Verdict, expected: Expected, found: Judgement) -> None:
    """Compare the all-reduce over all nodes with the floor, unless a slow node or pair explains it."""
    world = reports.of("world")
    if world and world[0]["mb_s"] < expected.floors.min_mb_s and not found.bad and not verdict.undecided:
        found.no_single_node.append(
            f"over all nodes: {world[0]['mb_s']:.0f} MB/s, below {expected.floors.min_mb_s:g}, though no pair is. "
            "Fix: TSM_MIN_ALL_REDUCE_MB_S, or the switches between"
        )


def _speed(pair: Measured) -> str:
    return f"{pair.mb_s:.1f} MB/s and {pair.latency_us:.0f} us at best" if pair.mb_s else "it fails"

"""Pair nodes for measurements, and find the slow nodes among the results: pure functions.

Neighbours measure in rounds, each node with a different partner per round. A slow node is slow with all its partners; a partner is
slow only with it. A node that was slow with all partners measures again, with a node that was fast with at least one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Pair = tuple[str, str]

# Without a floor, a pair is slow below this fraction of the usual bandwidth. Busy CPUs alone made a pair 5 times slower.
_SLOW_FRACTION = 0.1


@dataclass(frozen=True)
class Measured:
    """A measured all-reduce between the ranks of two nodes."""

    nodes: Pair
    mb_s: float
    latency_us: float


@dataclass(frozen=True)
class Floors:
    """Limits set by the site; 0: none."""

    min_mb_s: float = 0.0
    max_latency_us: float = 0.0


def rounds(nodes: Sequence[str]) -> list[list[Pair]]:
    """Pair the neighbours in a ring: each node is in at most one pair per round, and meets both neighbours in all."""
    count = len(nodes)
    if count < 2:
        return []
    if count == 2:
        return [[(nodes[0], nodes[1])]]
    edges = [(nodes[i], nodes[(i + 1) % count]) for i in range(count)]
    if count % 2 == 0:
        return [edges[0::2], edges[1::2]]
    return [edges[0:-1:2], edges[1:-1:2], edges[-1:]]


def usual_mb_s(measured: Iterable[Measured]) -> float:
    """Return the upper quartile: one slow node of three makes two of three pairs slow, so the median would be slow."""
    ordered = sorted(each.mb_s for each in measured)
    return ordered[math.ceil(0.75 * (len(ordered) - 1))] if ordered else 0.0


def slow_pairs(measured: Iterable[Measured], floors: Floors) -> set[Pair]:
    """Return the pairs below the floor or, without a floor, those far below the usual bandwidth."""
    measured = list(measured)
    min_mb_s = floors.min_mb_s or _SLOW_FRACTION * usual_mb_s(measured)
    max_latency_us = floors.max_latency_us or float("inf")
    return {each.nodes for each in measured if each.mb_s < min_mb_s or each.latency_us > max_latency_us}


@dataclass(frozen=True)
class Verdict:
    """Slow nodes, proven by a partner that is fast with another node; and undecided ones without such a partner."""

    slow: list[str]
    undecided: list[str]


def judge_pairs(measured: Iterable[Measured], floors: Floors) -> Verdict:
    """Find the slow and the undecided nodes."""
    measured = list(measured)
    slow = slow_pairs(measured, floors)
    fast = {node for each in measured if each.nodes not in slow for node in each.nodes}
    suspects = sorted({node for pair in slow for node in pair} - fast)
    proven = {node for pair in slow for node, other in (pair, pair[::-1]) if node not in fast and other in fast}
    return Verdict([node for node in suspects if node in proven], [node for node in suspects if node not in proven])


def retrial(measured: Iterable[Measured], floors: Floors) -> list[Pair]:
    """Pair each undecided node with a node that was fast with at least one partner."""
    measured = list(measured)
    undecided = judge_pairs(measured, floors).undecided
    slow = slow_pairs(measured, floors)
    fast = sorted({node for each in measured if each.nodes not in slow for node in each.nodes})
    return list(zip(undecided, fast, strict=False))

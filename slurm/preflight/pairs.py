"""Which nodes measure with which, and which are slow: pure functions.

Neighbours measure in rounds, each node with another partner in each, so that a slow node, slow with everyone, is told from its
partners, slow with it alone. Whoever was slow with everyone measures once more, with a node that was fast with somebody.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Pair = tuple[str, str]

_OF_THE_USUAL = 0.1  # below which a pair is slow where no floor is given; five times slower is seen where CPUs are busy


@dataclass(frozen=True)
class Measured:
    """An all-reduce between the ranks of two nodes."""

    nodes: Pair
    mb_s: float
    latency_us: float


@dataclass(frozen=True)
class Floors:
    """0: none given."""

    min_mb_s: float = 0.0
    max_latency_us: float = 0.0


def rounds(nodes: Sequence[str]) -> list[list[Pair]]:
    """Pairs of neighbours in a ring, each node in at most one pair of a round, and with both neighbours at the end."""
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
    """The upper quartile: of three nodes one that is slow makes two of three pairs slow, and no median tells."""
    ordered = sorted(each.mb_s for each in measured)
    return ordered[math.ceil(0.75 * (len(ordered) - 1))] if ordered else 0.0


def slow_pairs(measured: Iterable[Measured], floors: Floors) -> set[Pair]:
    """Those below the floor; where none is given, those far below the usual."""
    measured = list(measured)
    min_mb_s = floors.min_mb_s or _OF_THE_USUAL * usual_mb_s(measured)
    max_latency_us = floors.max_latency_us or float("inf")
    return {each.nodes for each in measured if each.mb_s < min_mb_s or each.latency_us > max_latency_us}


@dataclass(frozen=True)
class Verdict:
    """Nodes slow with one that is fast with another; and nodes slow with everyone, none of whom is known to be fast."""

    slow: list[str]
    undecided: list[str]


def judge_pairs(measured: Iterable[Measured], floors: Floors) -> Verdict:
    measured = list(measured)
    slow = slow_pairs(measured, floors)
    fast = {node for each in measured if each.nodes not in slow for node in each.nodes}
    suspects = sorted({node for pair in slow for node in pair} - fast)
    proven = {node for pair in slow for node, other in (pair, pair[::-1]) if node not in fast and other in fast}
    return Verdict([node for node in suspects if node in proven], [node for node in suspects if node not in proven])


def retrial(measured: Iterable[Measured], floors: Floors) -> list[Pair]:
    """For each node that was slow with everyone, and whose partners were too, a partner that was fast with somebody."""
    measured = list(measured)
    undecided = judge_pairs(measured, floors).undecided
    slow = slow_pairs(measured, floors)
    fast = sorted({node for each in measured if each.nodes not in slow for node in each.nodes})
    return list(zip(undecided, fast, strict=False))

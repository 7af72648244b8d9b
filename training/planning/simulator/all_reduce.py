"""Estimate the time of an all-reduce: from a measured table, or from the constants by which NCCL chooses its algorithms."""

from collections.abc import Callable
from math import log, log2

import numpy as np

from .figures import Cluster, Table

AllReduce = Callable[[float], float]
"""Seconds of an all-reduce by the bytes that each rank contributes."""

_PROTOCOLS = ("LL", "LL128", "Simple")
# NVIDIA/nccl, src/graph/tuning.cc (2.10): latencies in microseconds by protocol, of hops within a node and over the network.
_BASE_US = {"tree": (4.4, 4.4, 0.0), "ring": (3.6, 10.0, 8.4)}
_HOP_US = {
    ("tree", "nvlink"): (0.52, 1.2, 28.0), ("ring", "nvlink"): (0.47, 1.9, 3.4),
    ("tree", "pcie"): (1.0, 1.9, 28.0), ("ring", "pcie"): (1.0, 2.5, 5.7),
    ("tree", "network"): (5.0, 8.5, 50.0), ("ring", "network"): (2.7, 4.0, 9.6),
}  # fmt: skip
# Share of the bus bandwidth that each protocol's payload gets.
_PAYLOAD = {"tree": (0.9 / 3.8, 0.9 * 0.915, 0.9), "ring": (0.25, 0.92, 1.0)}
# Share of the tree's bandwidth at 64 B, 128 B ... 128 MiB.
_TREE_CORRECTION = {
    "LL": (1, 1, 1, 1, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1),
    "LL128": (1, 1, 1, 1, 1, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6, 0.6, 0.5, 0.6, 0.6, 0.7, 0.7, 0.8, 0.9, 0.9, 1),
    "Simple": (0.9,) * 7 + (0.8, 0.7, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6, 0.6, 0.7, 0.8, 0.9),
}
NCCL_SOURCE = "NCCL's own cost model (NVIDIA/nccl, src/graph/tuning.cc) at the cluster's bandwidths"


def all_reduce_of(cluster: Cluster, ranks: int, per_node: int | None = None) -> AllReduce:
    """Return the all-reduce of `ranks` ranks, `per_node` of them (default: all of a node's) on each node."""
    on_node = min(ranks, per_node or cluster["gpus_per_node"])
    if cluster.all_reduce is not None:
        table = cluster.all_reduce
        return lambda num_bytes: table_s(table, num_bytes, ranks)
    return lambda num_bytes: nccl_s(
        num_bytes, ranks, -(-ranks // on_node), cluster["node_link"], cluster["node_gb_s"], cluster["network_gb_s"]
    )


def nccl_s(num_bytes: float, ranks: int, nodes: int, node_link: str, node_gb_s: float, network_gb_s: float) -> float:
    """Return the seconds of the fastest of NCCL's algorithms (ring, tree) and protocols, as NCCL estimates them.

    `node_gb_s` bounds what one accelerator sends within a node, `network_gb_s` what a node sends. Channels, CollNet and NVLS
    are not modelled. LL128 needs NVLink.
    """
    if ranks == 1:
        return 0.0
    bandwidth_gb_s = node_gb_s if nodes == 1 else min(node_gb_s, network_gb_s)
    times_s = []
    for algorithm in ("tree", "ring"):
        for place, protocol in enumerate(_PROTOCOLS):
            if protocol == "LL128" and node_link != "nvlink":
                continue
            near_us, far_us = _HOP_US[algorithm, node_link][place], _HOP_US[algorithm, "network"][place]
            near_us *= 1.8 if nodes > 1 and protocol == "LL" else 1.0
            gb_s = bandwidth_gb_s * _PAYLOAD[algorithm][place]
            if algorithm == "ring":
                hops, far_hops = 2 * (ranks - 1), 2 * (nodes - 1)
                latency_us = _BASE_US["ring"][place] + (hops - far_hops) * near_us + far_hops * far_us
                # NCCL's plateau of the ring between nodes.
                if protocol == "Simple" and nodes > 1 and num_bytes >= ranks / 16 * 65536:
                    latency_us *= 1.9
                gb_s *= ranks / (2 * (ranks - 1))
            else:
                latency_us = _BASE_US["tree"][place] + 2 * ((ranks / nodes - 1) * near_us + int(log2(nodes)) * far_us)
                size_class = int(log2(max(num_bytes, 64.0) / 64))
                gb_s *= 0.5 * (_TREE_CORRECTION[protocol][size_class] if size_class < 22 else 1.0)
            times_s.append(latency_us * 1e-6 + num_bytes / (gb_s * 1e9))
    return min(times_s)


def table_s(table: Table, num_bytes: float, ranks: int) -> float:
    """Return the seconds of an all-reduce of `ranks` ranks from those measured on `table.ranks`.

    Between measured sizes: linear in the logarithms. Beyond the largest: its bandwidth. Below the smallest: on a line to the
    latency, which is what the two smallest sizes leave for no bytes. Other ranks: the latency grows in proportion to the hops
    (ring) or to the logarithm of the ranks (tree); the rest grows as what a ring sends, 2 (N - 1) / N of the bytes.
    """
    if ranks == 1:
        return 0.0
    sizes, seconds = np.array(table.bytes_P), np.array(table.seconds_P)
    latency_s = _latency_s(table)
    if num_bytes > sizes[-1]:
        measured_s = seconds[-1] * num_bytes / sizes[-1]
    elif num_bytes < sizes[0]:
        measured_s = latency_s + (seconds[0] - latency_s) * num_bytes / sizes[0]
    else:
        measured_s = float(np.exp(np.interp(log(num_bytes), np.log(sizes), np.log(seconds))))
    latency_s = min(latency_s, measured_s)
    if table.growth == "ring":
        growth = (ranks - 1) / (table.ranks - 1)
    else:
        growth = log2(ranks) / log2(table.ranks)
    sent = ((ranks - 1) / ranks) / ((table.ranks - 1) / table.ranks)
    return latency_s * growth + (measured_s - latency_s) * sent


def _latency_s(table: Table) -> float:
    """Return the time of an all-reduce of no bytes: on a slow link the smallest size takes mostly transfer."""
    first_s = table.seconds_P[0]
    if len(table.seconds_P) == 1:
        return first_s
    per_byte_s = (table.seconds_P[1] - first_s) / (table.bytes_P[1] - table.bytes_P[0])
    return min(first_s, max(0.0, first_s - per_byte_s * table.bytes_P[0]))

"""Measure all-reduce between nodes for preflight: NCCL if torch finds a GPU on every rank, else Gloo with one rank per node.

Before any collective all ranks register at a TCP store, so that missing ranks are known and left out. Ranks also store their
measurements there, and rank 0 reports them. Every wait has a limit. A pair that fails counts as 0 MB/s, and its nodes continue.

NCCL is untested here: no machine with two GPUs was available.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from distributed.addresses import rendezvous_address, set_interfaces
from distributed.topology import Topology, TopologyError, find_topology

from .node import node_name, report
from .pairs import Floors, Measured, Pair, judge_pairs, retrial, rounds

_SMALLEST_BYTES = 1 << 20
_LARGEST_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
_LONG_ENOUGH_S = 0.2
_LATENCY_REPEATS = 20


@dataclass(frozen=True)
class Plan:
    """The ranks that measure. Rank 0 decides when all ranks have registered or the limit has passed."""

    ranks: dict[str, list[int]]
    """By node."""
    came: int
    """Number of ranks that registered, including those that do not measure."""
    cuda: bool

    @property
    def members(self) -> list[int]:
        return sorted(rank for ranks in self.ranks.values() for rank in ranks)


def open_store(place: Topology, limit_s: float) -> dist.TCPStore:
    host, port = rendezvous_address(place) if place.size > 1 else ("127.0.0.1", 0)
    limit = timedelta(seconds=limit_s)
    return dist.TCPStore(host, port, None, is_master=place.rank == 0, timeout=limit, wait_for_workers=False)


def agree_on_plan(store: dist.Store, place: Topology, limit_s: float) -> Plan:
    """Register this rank and whether it has a GPU. Rank 0 waits, reports the nodes that joined, and shares the plan."""
    here = {"node": node_name(), "cuda": torch.cuda.is_available()}
    store.set(f"here/{place.rank}", json.dumps(here))
    if place.rank == 0:
        keys = [f"here/{rank}" for rank in range(place.size)]
        deadline_s = time.monotonic() + limit_s
        while not store.check(keys) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        came = {rank: json.loads(store.get(key)) for rank, key in enumerate(keys) if store.check([key])}
        cuda = all(each["cuda"] for each in came.values())
        if any(each["cuda"] for each in came.values()):
            for node in {each["node"] for each in came.values() if not each["cuda"]}:
                report("no-cuda", node=node)
        ranks: dict[str, list[int]] = {}
        for rank, each in came.items():
            of_node = ranks.setdefault(each["node"], [])
            if cuda or not of_node:
                of_node.append(rank)
        for node in ranks:
            report("joined", node=node)
        store.set("plan", json.dumps(asdict(Plan(ranks, len(came), cuda))))
    return Plan(**json.loads(store.get("plan")))


def meet(store: dist.Store, name: str, count: int, limit_s: float) -> None:
    """Wait for all members at the store: a barrier without collectives, which a broken network could not carry."""
    deadline_s = time.monotonic() + limit_s
    store.add(f"came to {name}", 1)
    while store.add(f"came to {name}", 0) < count:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not all ranks came to {name} within {limit_s:.0f} s")
        time.sleep(0.02)


def measure(device: torch.device) -> tuple[float, float]:
    """Return an all-reduce's bus bandwidth in MB/s, as nccl-tests: 2 (n - 1) / n bytes/s, and the latency of 4 bytes in us.

    The size grows until one all-reduce takes long enough to be measured, so that a slow network gets small ones.
    """

    def seconds(x: torch.Tensor) -> float:
        started_s = time.perf_counter()
        dist.all_reduce(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started_s

    tiny = torch.zeros(1, device=device)
    # The first one opens the connections.
    seconds(tiny)
    latency_us = 1e6 * statistics.median(seconds(tiny) for _ in range(_LATENCY_REPEATS))

    size_bytes = _SMALLEST_BYTES
    while True:
        x = torch.zeros(size_bytes // 4, device=device)
        longest_s = torch.tensor([seconds(x)], device=device)
        # All ranks must decide the same way about the next size.
        dist.all_reduce(longest_s, dist.ReduceOp.MAX)
        best_s = float(longest_s.item())
        if best_s > _LONG_ENOUGH_S or size_bytes >= _LARGEST_BYTES[device.type]:
            break
        size_bytes *= 4
    if best_s < 1.0:
        best_s = min(best_s, seconds(x), seconds(x))
    count = dist.get_world_size()
    return 2 * (count - 1) / count * size_bytes / best_s / 1e6, latency_us


class Measuring:
    """The measurements of one member. Each has its own process group, so that one can fail without the others."""

    def __init__(self, store: dist.Store, place: Topology, plan: Plan, limit_s: float) -> None:
        self._store, self._rank, self._plan, self._limit_s = store, place.rank, plan, limit_s
        self._device = torch.device("cpu")
        if plan.cuda:
            # Slurm lets a rank see all GPUs of its node, or only its own.
            self._device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self._device)

    def run(self, floors: Floors) -> None:
        """Measure all rounds, then all nodes together unless one of them is slow. Rank 0 reports."""
        measured: list[Measured] = []
        for number, pairs in enumerate(rounds(list(self._plan.ranks))):
            measured += self._run_round(f"round {number}", pairs)
        # Every member has the same results, so all choose the same retrial.
        measured += self._run_round("retrial", retrial(measured, floors))
        if self._rank == 0:
            for each in measured:
                report("pair", **asdict(each))
        if len(self._plan.members) > 1 and not judge_pairs(measured, floors).slow:
            mb_s, latency_us = self._measure("all nodes", list(self._plan.ranks))
            if self._rank == 0:
                report("world", ranks=len(self._plan.members), mb_s=mb_s, latency_us=latency_us)

    def _run_round(self, name: str, pairs: Sequence[Pair]) -> list[Measured]:
        """Measure all pairs of a round at the same time; every member gets all results."""
        for pair in pairs:
            if node_name() in pair:
                result = self._measure(name, pair)
                if self._rank == self._plan.ranks[pair[0]][0]:
                    self._store.set(f"{name} of {pair}", json.dumps(result))
        meet(self._store, name, len(self._plan.members), 2 * self._limit_s)
        return [Measured(pair, *json.loads(self._store.get(f"{name} of {pair}"))) for pair in pairs]

    def _measure(self, name: str, nodes: Sequence[str]) -> tuple[float, float]:
        """Measure in a process group of these nodes' ranks. Return 0 MB/s and infinite latency if it fails."""
        ranks = sorted(rank for node in nodes for rank in self._plan.ranks[node])
        try:
            dist.init_process_group(
                "nccl" if self._plan.cuda else "gloo",
                store=dist.PrefixStore(f"{name} of {ranks[0]}", self._store),
                rank=ranks.index(self._rank),
                world_size=len(ranks),
                timeout=timedelta(seconds=self._limit_s),
            )
            result = measure(self._device)
            dist.destroy_process_group()
            return result
        except (RuntimeError, ValueError) as error:
            report("failed", nodes=list(nodes[:2]), error=str(error)[:300])
            if dist.is_initialized():
                dist.destroy_process_group()
            return 0.0, float("inf")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-s", type=float, required=True)
    parser.add_argument("--min-mb-s", type=float, default=0.0)
    parser.add_argument("--max-latency-us", type=float, default=0.0)
    options = parser.parse_args()
    place = find_topology()
    # Ranks that load torch from a busy file system arrive minutes apart; each later step takes about a second.
    come_s, step_s = options.limit_s / 2, max(10.0, options.limit_s / 10)
    try:
        set_interfaces(place)
        store = open_store(place, options.limit_s)
    except (TopologyError, RuntimeError) as error:
        report("failed", nodes=[node_name()], error=str(error)[:500])
        sys.exit(1)
    plan = agree_on_plan(store, place, come_s)
    if place.rank in plan.members:
        try:
            Measuring(store, place, plan, step_s).run(Floors(options.min_mb_s, options.max_latency_us))
        except (RuntimeError, OSError) as error:
            report("failed", nodes=[], error=str(error)[:300])
    if place.rank == 0:
        report("over", transport="nccl" if plan.cuda else "gloo")
        # The store ends with rank 0.
        leave_last(store, plan.came, step_s)
    else:
        store.add("leaving", 1)
    sys.stdout.flush()
    # The destructor of a failed communicator may hang.
    os._exit(0)


def leave_last(store: dist.Store, count: int, limit_s: float) -> None:
    """Wait until all other ranks have left, at most limit_s."""
    deadline_s = time.monotonic() + limit_s
    while store.add("leaving", 0) < count - 1 and time.monotonic() < deadline_s:
        time.sleep(0.02)


if __name__ == "__main__":
    main()

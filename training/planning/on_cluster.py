"""Simulate a plan's run on its cluster: check memory and step time against the device, and compare world sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from training.config.schema import Config
from training.errors import ConfigError
from training.recipe import Execution, make_execution, micro_batches

from .memory import LEFT_OUT, StepCosts
from .simulator.figures import Cluster, read_cluster
from .simulator.run import Simulation, simulate
from .simulator.step import STEP_FLOPS, Layout, Workload, rates_of
from .simulator.sweep import Change, best_changes
from .workload import layout_of

# Beside the tensors, a process needs what memory.LEFT_OUT names.
_RESERVED_GIB = 1.0


@dataclass(frozen=True)
class OnCluster:
    """A run on a cluster, and what would help it."""

    cluster: Cluster
    workload: Workload
    simulation: Simulation
    changes: list[Change]


@dataclass(frozen=True)
class Point:
    """A world size of a sweep: its simulation, or why the recipe does not run there."""

    world: int
    simulation: Simulation | None
    problem: str | None = None


def cluster_of(config: Config) -> Cluster | None:
    """Return the cluster of cluster=NAME; None if none is chosen. Raises ConfigError for an invalid description."""
    if config.cluster.name is None:
        return None
    return read_cluster(config.cluster.name, config.cluster.figures)


def run_on(
    config: Config,
    cluster: Cluster,
    workload: Workload,
    execution: Execution,
    worlds: Sequence[int],
    memory: "MemoryRule | None",
) -> OnCluster:
    """Simulate the run. Raises ConfigError if the cluster is too small, or plan.step_s beyond the device's peak."""
    check_size(cluster, execution.world)
    now = layout_of(execution)
    if config.plan.step_s is not None:
        check_step_time(config.plan.step_s, cluster, workload, execution.world)
        # A measured step time says nothing about another precision or layout.
        return OnCluster(cluster, workload, _simulate(config, cluster, workload, now), [])
    found = _simulate(config, cluster, workload, now)
    fitting = [world for world in worlds if world <= cluster["nodes"] * cluster["gpus_per_node"]]
    layouts = [layout_of(_execution(config, world)) for world in fitting if _is_whole(world, cluster)]
    if memory is not None:
        layouts += _larger_micro_batches(config, cluster, execution, memory)
    changes = best_changes(
        cluster, workload, found, layouts, lambda changed, layout: _simulate(config, cluster, changed, layout)
    )
    return OnCluster(cluster, workload, found, changes)


def _larger_micro_batches(config: Config, cluster: Cluster, execution: Execution, memory: "MemoryRule") -> list[Layout]:
    """Return the layouts on the same world with larger micro-batches that fit into the device's memory."""
    groups = config.batch.global_batch, config.batch.bn_clips, execution.world
    most_gib = cluster["memory_gib"] - _RESERVED_GIB
    sizes = [size for size in micro_batches(*groups) if size > execution.micro_batch and memory.gib(size) <= most_gib]
    return [layout_of(make_execution(*groups, size)) for size in sizes]


def sweep(config: Config, cluster: Cluster, workload: Workload, memory: "MemoryRule | None") -> list[Point]:
    """Simulate the run at each world size of plan.sweep. A world that does not fit has a problem instead."""
    if config.plan.step_s is not None:
        raise ConfigError("plan.step_s is the step time of one world size. Fix: plan.sweep without plan.step_s")
    points = []
    for world in sorted(set(config.plan.sweep)):
        try:
            check_size(cluster, world)
            execution = _execution(config, world)
            if memory is not None:
                memory.check(cluster, execution.micro_batch)
            points.append(Point(world, _simulate(config, cluster, workload, layout_of(execution))))
        except ConfigError as error:
            points.append(Point(world, None, str(error)))
    return points


def _execution(config: Config, world: int) -> Execution:
    batch = config.batch
    return make_execution(batch.global_batch, batch.bn_clips, world, batch.micro_batch_limit)


def _simulate(config: Config, cluster: Cluster, workload: Workload, layout: Layout) -> Simulation:
    plan, price = config.plan, config.cluster.price_per_gpu_h
    return simulate(cluster, workload, layout, plan.experience, price, plan.step_s)


def _is_whole(world: int, cluster: Cluster) -> bool:
    return world <= cluster["gpus_per_node"] or world % cluster["gpus_per_node"] == 0


def nodes_by_gpus(world: int, per_node: int) -> str:
    """Return `256 x 6`: nodes and the processes on each; `11 nodes` if these have different numbers of them."""
    nodes = -(-world // per_node)
    return f"{nodes} x {world // nodes}" if world % nodes == 0 else f"{nodes} nodes"


def whole_worlds(worlds: Sequence[int], cluster: Cluster) -> list[str]:
    """Return the world sizes that fill whole nodes of the cluster, or lie in one, as nodes x GPUs."""
    most, per_node = cluster["nodes"] * cluster["gpus_per_node"], cluster["gpus_per_node"]
    return [nodes_by_gpus(world, per_node) for world in worlds if world <= most and _is_whole(world, cluster)]


def check_size(cluster: Cluster, world: int) -> None:
    most = cluster["nodes"] * cluster["gpus_per_node"]
    if world > most:
        raise ConfigError(
            f"{cluster.name} has {cluster['nodes']} x {cluster['gpus_per_node']} accelerators, and the plan is for {world}. "
            f"Fix: distributed.world_size={most} or less, or another cluster"
        )


def check_step_time(step_s: float, cluster: Cluster, workload: Workload, world: int) -> None:
    """Raise ConfigError if the step time needs more than the device's peak."""
    peak = rates_of(cluster, workload.precision)[0]
    needed = STEP_FLOPS * workload.clip_multiply_adds * workload.global_batch / world / step_s / 1e12
    if needed > peak:
        least_s = ceil(1000 * step_s * needed / peak) / 1000
        raise ConfigError(
            f"plan.step_s={step_s:g} on {world} processes needs {needed:,.1f} TFLOP/s each, {needed / peak:.1f} times the peak of "
            f"{cluster['device']} in {workload.precision} ({peak:g}). Fix: plan.step_s={least_s:g} or more, or more processes"
        )


@dataclass(frozen=True)
class MemoryRule:
    """Memory of a step as a line in the clips of a micro-batch, from one count of the tensors.

    Activations grow with the clips; weights, gradients and the optimizer's state do not.
    """

    costs: StepCosts
    micro_batch: int

    def gib(self, micro_batch: int) -> float:
        costs = self.costs
        fixed_bytes = min(costs.peak_bytes, costs.weights_bytes + costs.optimizer_bytes + costs.gradients_bytes)
        return (fixed_bytes + (costs.peak_bytes - fixed_bytes) * micro_batch / self.micro_batch) / 2**30

    def check(self, cluster: Cluster, micro_batch: int) -> None:
        """Raise ConfigError if the tensors of a micro-batch exceed the device's memory."""
        if self.gib(micro_batch) > cluster["memory_gib"]:
            raise ConfigError(
                f"a step needs {self.gib(micro_batch):.1f} GiB, and {cluster['device']} has {cluster['memory_gib']:g} GiB. "
                f"Fix: a lower batch.micro_batch"
            )


def check_memory(config: Config, cluster: Cluster, costs: StepCosts, execution: Execution) -> str | None:
    """Raise ConfigError if the tensors of a step exceed the device's memory. Returns a warning if little is left.

    With batch.micro_batch=auto, training takes fewer clips instead.
    """
    needed, has = costs.peak_bytes / 2**30, cluster["memory_gib"]
    if config.batch.is_auto or needed + _RESERVED_GIB <= has:
        return None
    rule = MemoryRule(costs, execution.micro_batch)
    batch = config.batch
    sizes = micro_batches(batch.global_batch, batch.bn_clips, execution.world)
    fitting = [size for size in sizes if size < execution.micro_batch and rule.gib(size) + _RESERVED_GIB <= has]
    fix = f"batch.micro_batch={max(fitting)}" if fitting else "more processes"
    if config.numerics.amp == "off" and config.numerics.dtype == "float32":
        fix += ", or numerics=gpu_fp16 (half of the activations)"
    said = f"a step needs {needed:.1f} GiB for its tensors, and {cluster['device']} has {has:g} GiB"
    if needed > has:
        raise ConfigError(f"{said}. Fix: {fix}")
    return f"{said}, which leaves little for {LEFT_OUT}. Fix, if it runs out: {fix}"

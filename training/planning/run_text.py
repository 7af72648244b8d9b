"""Write a simulated run as text and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .on_cluster import OnCluster, Point, nodes_by_gpus
from .simulator.figures import Cluster
from .simulator.run import Interval, Simulation
from .simulator.sweep import Change

MEANING = {
    "clips": "compute time of the clips (k)",
    "c0": "compute time besides the clips (c0)",
    "jitter": "waiting for the slowest rank",
    "gradients": "all-reduce that backward does not hide",
    "batch norm": "messages of batch norm over ranks",
    "experience": "loss that such models miss",
    "input": "input stall",
    "start-up": "start-up",
    "first step": "excess of the first step",
    "evaluations": "evaluations",
    "last checkpoint": "last checkpoint",
}
"""Terms of a run, as users read them."""

COLUMNS = (
    "processes",
    "nodes x GPUs",
    "time",
    "80% interval",
    "ms/step",
    "clips/s",
    "efficiency",
    "GPU h",
    "kWh",
    "limit",
)


def duration(seconds: float) -> str:
    """Return `1 h 02 min`, `14.2 min` or `45 s`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min"


def between(interval: Interval) -> str:
    return f"{duration(interval.low)} to {duration(interval.high)}"


def describe_run(found: OnCluster) -> list[str]:
    """Describe the time to train, its terms with their sources, and the changes that would help most."""
    run, cluster = found.simulation, found.cluster
    per_node = cluster["gpus_per_node"]
    factor = f", experience factor {run.experience:g}" if run.experience != 1 else ", no experience factor"
    cost = f", cost {run.cost:,.0f}" if run.cost is not None else ""
    lines = [
        f"cluster    {cluster.name}: {nodes_by_gpus(run.layout.world, per_node)} {cluster['device']}, {found.workload.precision}",
        f"time       {duration(run.time_to_train_s.centre)} to train, 80% interval {between(run.time_to_train_s)}: "
        f"{run.step_s.centre * 1000:.4g} ms per step{factor}",
        f"           {run.clips_per_s:,.0f} clips/s, efficiency {run.efficiency:.1%}, {run.gpu_hours:,.1f} GPU hours, "
        f"{run.energy_kwh:,.0f} kWh{cost}",
    ]
    for name, part in run.terms.items():
        if part.seconds > 0:
            lines += [f"           {part.seconds:9.1f} s  {MEANING[name]} [{part.sure}: {part.source}]"]
    lines += [f"limit      {MEANING[run.limit]}"]
    lines += [f"change     {_describe_change(change)}" for change in found.changes]
    return lines


def _describe_change(change: Change) -> str:
    time = f"{change.time_saved:.0%} less time" if change.time_saved >= 0 else f"{-change.time_saved:.0%} more time"
    return f"{change.what} ({change.how}): {time}, {change.gpu_hours_saved:.0%} fewer GPU hours"


def rows_of(points: Sequence[Point], per_node: int) -> list[list[str]]:
    """Return the cells of each world size that fits, under COLUMNS."""
    rows = []
    for point in points:
        run = point.simulation
        if run is not None:
            rows.append([
                f"{point.world:,}", nodes_by_gpus(point.world, per_node), duration(run.time_to_train_s.centre),
                between(run.time_to_train_s), _milliseconds(run.step_s.centre), f"{run.clips_per_s:,.0f}",
                f"{run.efficiency:.0%}", f"{run.gpu_hours:,.1f}", f"{run.energy_kwh:,.0f}", MEANING[run.limit],
                *([f"{run.cost:,.0f}"] if run.cost is not None else []),
            ])  # fmt: skip
    return rows


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f}" if seconds >= 1 else f"{seconds * 1000:.4g}"


def titles_of(points: Sequence[Point]) -> list[str]:
    priced = any(point.simulation is not None and point.simulation.cost is not None for point in points)
    return [*COLUMNS, *(["cost"] if priced else [])]


def describe_points(points: Sequence[Point], per_node: int) -> list[str]:
    """Return the table of a sweep, and a line for each world size that does not fit."""
    rows = [titles_of(points), *rows_of(points, per_node)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    refused = [f"{point.world}: {point.problem}" for point in points if point.problem is not None]
    return [f"sweep      {line}" for line in (*table, *refused)]


def run_fields(found: OnCluster | None, points: Sequence[Point], cluster: Cluster | None) -> dict[str, Any]:
    """Return the simulated run and the sweep as JSON values. Unknown values are null."""
    figures = None if cluster is None else {key: asdict(figure) for key, figure in cluster.figures.items()}
    return {
        "cluster": cluster and {"name": cluster.name, "figures": figures},
        **(_simulation_fields(found.simulation) if found is not None else {"time_to_train_s": None, "terms": None}),
        "changes": [asdict(change) for change in found.changes] if found is not None else [],
        "sweep": [
            {"world_size": point.world, "problem": point.problem}
            | (_simulation_fields(point.simulation) if point.simulation is not None else {})
            for point in points
        ],
    }


def _simulation_fields(run: Simulation) -> dict[str, Any]:
    terms = {name: asdict(part) | {"meaning": MEANING[name]} for name, part in run.terms.items()}
    return {
        "time_to_train_s": asdict(run.time_to_train_s),
        "simulated_step_s": asdict(run.step_s),
        "step_parts": {name: asdict(part) for name, part in run.step.parts.items()},
        "terms": terms,
        "steps_s": sum(run.terms[name].seconds for name in (*run.step.parts, "experience", "input")),
        "nodes": run.nodes,
        "experience": run.experience,
        "simulated_clips_per_s": run.clips_per_s,
        "efficiency": run.efficiency,
        "gpu_hours": run.gpu_hours,
        "energy_kwh": run.energy_kwh,
        "cost": run.cost,
        "limit": MEANING[run.limit],
    }

"""Compare world sizes, and find the changes of a run that would help most."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .figures import Cluster
from .run import Simulation
from .step import Layout, Workload

Simulate = Callable[[Workload, Layout], Simulation]


@dataclass(frozen=True)
class Change:
    """A change of a run, and its effect."""

    what: str
    how: str
    """The overrides that make it."""
    time_saved: float
    """Share of the time to train; negative: takes longer."""
    gpu_hours_saved: float


def best_changes(
    cluster: Cluster,
    workload: Workload,
    now: Simulation,
    others: Sequence[Layout],
    simulate: Simulate,
    most: int = 3,
) -> list[Change]:
    """Return the changes that save most GPU hours, best first; only those that save 1% or more.

    At the same world size GPU hours follow the time. `others`: layouts of the same recipe on other worlds, or with larger
    micro-batches on this one.
    """
    changes = [
        _change(what, how, now, simulate(changed, now.layout))
        for what, how, changed in _changed(cluster, workload, now)
    ]
    fewer = [layout for layout in others if layout.world < now.layout.world]
    if fewer:
        # Half as many ranks, or the nearest that fits: fewer ranks always save GPU hours, and cost time.
        layout = min(fewer, key=lambda each: abs(each.world - now.layout.world / 2))
        what = f"fewer ranks: {layout.world} instead of {now.layout.world}"
        changes.append(_change(what, f"distributed.world_size={layout.world}", now, simulate(workload, layout)))
    larger = [
        layout for layout in others if layout.world == now.layout.world and layout.micro_batch > now.layout.micro_batch
    ]
    if larger:
        layout = max(larger, key=lambda each: each.micro_batch)
        what = f"larger micro-batches: {layout.micro_batch} clips instead of {now.layout.micro_batch}"
        changes.append(_change(what, f"batch.micro_batch={layout.micro_batch}", now, simulate(workload, layout)))
    changes = [change for change in changes if change.gpu_hours_saved >= 0.01]
    return sorted(changes, key=lambda change: -change.gpu_hours_saved)[:most]


def _changed(cluster: Cluster, workload: Workload, now: Simulation) -> list[tuple[str, str, Workload]]:
    """Return the changes of the workload that apply: what, overrides, workload."""
    found = []
    for precision, choice in (("bfloat16", "gpu"), ("float16", "gpu_fp16")):
        if workload.precision in ("float32", "tf32") and precision in cluster.achieved_tflop_s:
            found.append((f"AMP in {precision}", f"numerics={choice}", replace(workload, precision=precision)))
            break
    if not workload.prepared:
        found.append(("prepared data", "prepare.py transcode", replace(workload, prepared=True)))
    if workload.fp32_ratio == 1.0 and now.layout.world > 1:
        halved = tuple(replace(each, num_bytes=each.num_bytes // 2) for each in workload.gradients_P)
        sent = replace(workload, gradients_P=halved, fp32_ratio=2.0)
        found.append(("fp16 gradients", "distributed.gradient_dtype=float16", sent))
    if workload.evaluations > 1:
        once = replace(workload, evaluations=1)
        found.append(("one evaluation, at the end", "a larger evaluation.every_epochs", once))
    return found


def _change(what: str, how: str, now: Simulation, then: Simulation) -> Change:
    time = 1 - then.time_to_train_s.centre / now.time_to_train_s.centre
    return Change(what, how, time, 1 - then.gpu_hours / now.gpu_hours)

"""Simulate a run: time to train with an 80% interval, every term with its source, GPU hours, energy and cost."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .figures import Cluster
from .step import Layout, Part, Step, Workload, clip_s, fixed_s, model_step

SAMPLES = 4_000
SEED = 0
# The centre of the three-point start-up is its median; its ends are the least and the most seen.
_STARTUP_QUANTILES = (0.0, 0.5, 1.0)
# Uncertainty of what a network is said to do, as a standard deviation of the logarithm.
_NETWORK_SPREAD = 0.3
_LOW, _HIGH = 10, 90
_LIMITING_SHARE = 0.05


@dataclass(frozen=True)
class Interval:
    """The central value, and the 80% interval by Monte Carlo."""

    low: float
    centre: float
    high: float


@dataclass(frozen=True)
class Simulation:
    """A run on a cluster."""

    layout: Layout
    nodes: int
    step: Step
    step_s: Interval
    """With input and experience factor."""
    experience: float
    terms: Mapping[str, Part]
    """Seconds of the whole run by cause. Their sum is the centre of time_to_train_s."""
    time_to_train_s: Interval
    clips_per_s: float
    efficiency: float
    """Clips/s per rank, relative to a rank that computes the same micro-batches without waiting for anything."""
    gpu_hours: float
    energy_kwh: float
    cost: float | None
    """In the currency of cluster.price_per_gpu_h."""

    @property
    def limit(self) -> str:
        """The largest term besides the compute time of the clips; that one if no other takes 5% of the time.

        The experience factor is no cause, so it is left out.
        """
        others = {name: part.seconds for name, part in self.terms.items() if name not in ("clips", "experience")}
        largest = max(others, key=lambda name: others[name])
        return largest if others[largest] >= _LIMITING_SHARE * self.time_to_train_s.centre else "clips"


def simulate(
    cluster: Cluster,
    workload: Workload,
    layout: Layout,
    experience: float | None = None,
    price_per_gpu_h: float | None = None,
    step_s: float | None = None,
) -> Simulation:
    """Simulate a run. `experience`: None: the cluster's; 1: none. `step_s`: a measured step time, which replaces the model's.

    Same arguments, same result: the Monte Carlo has a fixed seed.
    """
    nodes = -(-layout.world // cluster["gpus_per_node"])
    step = model_step(cluster, workload, layout)
    if step_s is not None:
        step = Step({"clips": Part(step_s, "plan.step_s", "measured")}, 0.0, "")
    factor = 1.0 if step_s is not None else cluster["experience"] if experience is None else experience
    terms = _terms(cluster, workload, layout, step, factor, experience is None and step_s is None)
    total_s = sum(part.seconds for part in terms.values())
    central_step_s = max(step.busy_s / factor, step.input_s)
    steps_s, samples_s = _sampled(cluster, workload, step, factor, terms, experience is None, step_s is not None)
    micro_batch = layout.micro_batch
    micro_step_s = fixed_s(cluster, workload, micro_batch) + clip_s(cluster, workload) * micro_batch
    computed_s = layout.accumulation * micro_step_s
    gpu_hours = layout.world * total_s / 3600
    return Simulation(
        layout=layout,
        nodes=nodes,
        step=step,
        step_s=_interval(steps_s, central_step_s),
        experience=factor,
        terms=terms,
        time_to_train_s=_interval(samples_s, total_s),
        clips_per_s=workload.global_batch / central_step_s,
        efficiency=min(1.0, computed_s / central_step_s),
        gpu_hours=gpu_hours,
        energy_kwh=nodes * cluster["node_power_w"] * total_s / 3.6e6,
        cost=None if price_per_gpu_h is None else gpu_hours * price_per_gpu_h,
    )


def _terms(
    cluster: Cluster, workload: Workload, layout: Layout, step: Step, factor: float, from_cluster: bool
) -> dict[str, Part]:
    """Return the seconds of a run by cause."""
    figures = cluster.figures
    steps = workload.total_steps
    terms = {name: Part(steps * part.seconds, part.source, part.sure) for name, part in step.parts.items()}
    lost_s = steps * step.busy_s * (1 / factor - 1)
    source = figures["experience"].source if from_cluster else "plan.experience, or plan.step_s, switches it off"
    terms["experience"] = Part(lost_s, source, figures["experience"].sure)
    stall_s = steps * max(0.0, step.input_s - step.busy_s / factor)
    if step.input_limit == "reading":
        key = "read_gb_s"
    else:
        key = "decode_prepared_s" if workload.prepared else "decode_raw_s"
    terms["input"] = Part(stall_s, figures[key].source, figures[key].sure)
    startup = figures["startup_s"]
    terms["start-up"] = Part(startup.value[1], startup.source, startup.sure)
    first = figures["first_step_s"]
    terms["first step"] = Part(first.value, first.source, first.sure)
    evaluation = figures["evaluation_s"]
    # Forward only: a third of a step's arithmetic.
    forward_s = clip_s(cluster, workload) / 3 * -(-workload.evaluation_clips // layout.world)
    terms["evaluations"] = Part(
        workload.evaluations * (evaluation.value + forward_s), evaluation.source, evaluation.sure
    )
    writing = figures["checkpoint_gb_s"]
    written_s = workload.checkpoint_bytes / (writing.value * 1e9)
    # Written in the background, except the last.
    terms["last checkpoint"] = Part(written_s if workload.checkpoints else 0.0, writing.source, writing.sure)
    return terms


def _sampled(
    cluster: Cluster,
    workload: Workload,
    step: Step,
    factor: float,
    terms: Mapping[str, Part],
    varies: bool,
    is_measured: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return samples of the step time and of the time to train."""
    random = np.random.default_rng(SEED)
    compute, network, experience = random.standard_normal((3, SAMPLES))
    startup_s = _startup(random.random(SAMPLES), cluster["startup_s"])
    scale = 0.0 if is_measured else 1.0
    busy_s = sum(
        part.seconds
        * (
            np.exp(scale * _NETWORK_SPREAD * network)
            if name in ("gradients", "batch norm")
            else 1 + scale * cluster["compute_spread"] * compute
        )
        for name, part in step.parts.items()
    )
    factors = np.clip(
        factor + (cluster["experience_spread"] * experience if varies and not is_measured else 0), 0.1, None
    )
    steps_s = np.maximum(busy_s / factors, step.input_s)
    rest_s = sum(terms[name].seconds for name in ("first step", "evaluations", "last checkpoint"))
    return steps_s, workload.total_steps * steps_s + startup_s + rest_s


def _startup(uniform: NDArray[np.float64], three: tuple[float, float, float]) -> NDArray[np.float64]:
    """Return start-up times by the inverse of a distribution that is linear in the logarithm between least, median and most."""
    return np.exp(np.interp(uniform, _STARTUP_QUANTILES, np.log(three)))


def _interval(samples: NDArray[np.float64], centre: float) -> Interval:
    low, high = np.percentile(samples, (_LOW, _HIGH))
    return Interval(min(float(low), centre), centre, max(float(high), centre))

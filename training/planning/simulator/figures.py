"""Read a cluster's description (conf/cluster/*.yaml): every number comes with its source and how sure it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.errors import ConfigError

SURE = ("published", "measured", "derived", "guess")
"""How sure a figure is: read in its source, measured on that machine, arithmetic on published figures, or a guess."""

PRECISIONS = ("float64", "float32", "tf32", "float16", "bfloat16")


@dataclass(frozen=True)
class Figure:
    """A value with its source."""

    value: Any
    source: str
    sure: str


@dataclass(frozen=True)
class Table:
    """Measured all-reduces on some ranks: seconds by size."""

    ranks: int
    growth: str
    """Growth of the latency with the ranks: ring (linear) or tree (logarithmic)."""
    bytes_P: tuple[float, ...]
    seconds_P: tuple[float, ...]


@dataclass(frozen=True)
class Cluster:
    """A cluster, as the simulator needs it. `figures` holds the source of each value by its key."""

    name: str
    figures: Mapping[str, Figure]
    peak_tflop_s: Mapping[str, float]
    """Device peak by precision."""
    achieved_tflop_s: Mapping[str, float]
    """Rate of a training step by precision, without c0: 6 FLOPs per multiply-add (forward, and twice that backward)."""
    all_reduce: Table | None

    def __getitem__(self, key: str) -> Any:
        """Return the value of a figure."""
        return self.figures[key].value


NUMBERS = {
    "gpus_per_node": "accelerators of a node, one process each",
    "nodes": "nodes of the cluster",
    "memory_gib": "memory of an accelerator",
    "c0_s": "part of a step's compute time that does not depend on its clips: launches, optimizer",
    "c0_tensors": "trained tensors of the network that c0_s was taken from; c0 grows in proportion",
    "host_s": "least time of a micro-step, in which the host launches its kernels; 0: never a limit",
    "compute_spread": "relative standard deviation of the compute time between runs and networks",
    "jitter_s": "mean of the exponential delay of a rank in a step, on top of c0_s and clips",
    "node_gb_s": "bandwidth within a node, one direction per accelerator",
    "network_gb_s": "injection bandwidth of a node, one direction",
    "cores_per_node": "cores that decode",
    "decode_raw_s": "core seconds per clip of 8 frames from H.264 as downloaded",
    "decode_prepared_s": "core seconds per clip of 8 frames from prepared data (key frame every 16)",
    "read_gb_s": "storage bandwidth of a node while all read",
    "first_step_s": "excess of the first step over the others",
    "evaluation_s": "fixed cost of an evaluation",
    "checkpoint_gb_s": "write bandwidth of a checkpoint, from rank 0",
    "node_power_w": "power of a node while training",
    "experience": "published efficiency over this model's, on other clusters",
    "experience_spread": "standard deviation of experience between clusters",
}
"""Keys of numbers, with their meaning."""

OTHERS = {
    "device": "name of the accelerator",
    "node_link": "link between accelerators of a node: nvlink or pcie",
    "startup_s": "start-up: least, central and most seconds",
}

_BY_PRECISION = ("peak_tflop_s", "achieved_tflop_s")
_ZERO_IS_ALLOWED = ("jitter_s", "compute_spread", "experience_spread", "first_step_s", "evaluation_s", "c0_s", "host_s")


def read_cluster(name: str, figures: Mapping[str, Any]) -> Cluster:
    """Return the cluster of these figures. Raises ConfigError for a missing, unknown or unsourced one."""
    where = f"cluster {name}"
    known = {*NUMBERS, *OTHERS, *_BY_PRECISION, "all_reduce"}
    if unknown := sorted(set(figures) - known):
        raise ConfigError(f"{where}: unknown figures {', '.join(unknown)}. Fix: only {', '.join(sorted(known))}")
    missing = sorted(known - {"all_reduce"} - set(figures))
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}. Fix: add them as in conf/cluster/summit.yaml")
    found = {key: _figure(where, key, figures[key]) for key in (*NUMBERS, *OTHERS)}
    for key in NUMBERS:
        number = found[key].value
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not _is_allowed(key, number):
            raise ConfigError(f"{where}: {key} must be a number above 0, got {number!r}. Fix: correct its value")
    if found["node_link"].value not in ("nvlink", "pcie"):
        raise ConfigError(f"{where}: node_link must be nvlink or pcie. Fix: correct its value")
    startup = found["startup_s"].value
    if len(startup) != 3 or not 0 < startup[0] <= startup[1] <= startup[2]:
        raise ConfigError(f"{where}: startup_s must be [least, central, most] seconds. Fix: correct its value")
    rates = {key: _rates(where, key, figures[key], found) for key in _BY_PRECISION}
    table = figures.get("all_reduce")
    if table is not None:
        found["all_reduce"] = _figure(where, "all_reduce", table)
    measured = None if table is None else _table(where, found["all_reduce"].value)
    return Cluster(name, found, rates["peak_tflop_s"], rates["achieved_tflop_s"], measured)


def _is_allowed(key: str, number: float) -> bool:
    return number > 0 or (number == 0 and key in _ZERO_IS_ALLOWED)


def _figure(where: str, key: str, fields: Any) -> Figure:
    if not isinstance(fields, Mapping) or set(fields) != {"value", "source", "sure"}:
        raise ConfigError(
            f"{where}: {key} must have value, source and sure. Fix: {key}: {{value: ..., source: ..., sure: guess}}"
        )
    if not isinstance(fields["source"], str) or not fields["source"].strip():
        raise ConfigError(f"{where}: {key} has no source. Fix: source: where the value is from")
    if fields["sure"] not in SURE:
        raise ConfigError(f"{where}: sure of {key} must be one of {', '.join(SURE)}. Fix: sure: guess")
    return Figure(fields["value"], fields["source"], fields["sure"])


def _rates(where: str, key: str, by_precision: Mapping[str, Any], found: dict[str, Figure]) -> dict[str, float]:
    if not by_precision or not set(by_precision) <= set(PRECISIONS):
        raise ConfigError(f"{where}: {key} must have figures by precision. Fix: only {', '.join(PRECISIONS)}")
    for precision, fields in by_precision.items():
        found[f"{key}.{precision}"] = _figure(where, f"{key}.{precision}", fields)
    return {precision: float(found[f"{key}.{precision}"].value) for precision in by_precision}


def _table(where: str, value: Mapping[str, Any]) -> Table:
    table = Table(value["ranks"], value["growth"], tuple(value["bytes"]), tuple(value["seconds"]))
    ordered = list(table.bytes_P) == sorted(set(table.bytes_P)) and min(table.seconds_P) > 0
    if (
        table.growth not in ("ring", "tree")
        or table.ranks < 2
        or len(table.bytes_P) != len(table.seconds_P)
        or not ordered
    ):
        raise ConfigError(
            f"{where}: all_reduce must have ranks (2 or more), growth (ring or tree), and bytes in ascending order with as many "
            "seconds. Fix: correct its value"
        )
    return table

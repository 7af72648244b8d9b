"""The cluster that plan.py simulates a run on."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ClusterConfig:
    """Chosen by cluster=NAME, from conf/cluster/NAME.yaml. Only plan.py reads it."""

    name: str | None = None
    """Name of the cluster; null: unknown, so that nothing is said about time."""
    price_per_gpu_h: float | None = None
    """Price of a GPU hour, in any currency, for the cost of a run; null: no cost."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Every figure of the cluster as {value, source, sure}; training/planning/simulator/figures.py lists their keys."""

"""Predict the steps of MLPerf's ResNet-50 systems of many nodes from systems of one node, for benchmarks/simulator.py.

A step is c0 + k x images + what backward does not hide of the all-reduce. k follows from a system of one node, the one most
like it. Only c0, one for each generation of GPU, is fitted, to the files in benchmarks/data (`fit_c0_ms`), whatever file
is predicted.

Shapes: S systems, G values of c0.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from training.planning.simulator.all_reduce import nccl_s
from training.planning.simulator.overlap import BACKWARD_SHARE, Gradient, exposed_s, horovod_messages, ready_times
from training.planning.workload import gradients_of

DATA = Path(__file__).with_name("data") / "mlperf_resnet50.csv"
MORE = DATA.with_name("mlperf_resnet50_more.csv")
"""Systems to which c0 is fitted too."""
MANY_GPUS = 16
# A node has at most this many in the systems of the file that count as one node.
_ONE_NODE_GPUS = 8

C0_MS = {"V100": 13.1, "A100": 6.7, "H100": 3.1, "L40S": 1.0}
"""By fit_c0_ms on DATA and MORE, to 0.1 ms; 1 ms is the least that it tries."""
# Of generations without a system of many nodes: that of the same architecture.
_LIKE = {"A30": "A100", "A40": "A100", "A10": "A100", "A5000": "A100", "H200": "H100", "L40": "L40S", "L4": "L40S"}
_GENERATIONS = ("V100", "A100", "H100", "H200", "L40S", "L40", "A30", "A40", "L4", "A5000", "A10")
# GB/s of a node: 4 EDR ports, 8 HDR ports, 8 NDR ports; an Ethernet or PCIe node has less, which its log does not tell.
_NETWORK_GB_S = {"V100": 50.0, "A100": 200.0, "H100": 400.0}
_NODE_GB_S = {"V100": 130.0, "A100": 235.0, "H100": 450.0}
_GRID_MS = np.arange(1.0, 15.0, 0.1)
_ROUNDS = ("v0.6", "v0.7", "v1.0", "v1.1", "v2.0", "v2.1", "v3.0", "v3.1", "v4.0")


@dataclass(frozen=True)
class System:
    """A row of the file."""

    round: str
    submitter: str
    name: str
    generation: str
    is_pcie: bool
    memory_gb: str
    """As its name says; empty: unknown."""
    gpus: int
    images: float
    """Per GPU and step."""
    step_ms: float

    @property
    def like(self) -> str:
        """Generation whose c0 and links count."""
        return _LIKE.get(self.generation, self.generation)


def read_systems(path: Path) -> list[System]:
    """Read a file of MLPerf's systems."""
    with path.open() as file:
        return [_system(row) for row in csv.DictReader(file)]


def _system(row: Mapping[str, str]) -> System:
    text = f"{row['accelerator']} {row['system']}".upper().replace("_", " ")
    known = next((generation for generation in _GENERATIONS if generation in text), None)
    memory = re.search(r"(\d+) ?GB", text)
    return System(
        row["round"], row["submitter"], row["system"],
        # The first DGX logs name no accelerator.
        known or "V100", "PCIE" in text, memory[1] if memory else "",
        int(row["gpus"]), float(row["clips_per_gpu"]), float(row["step_ms"]),
    )  # fmt: skip


def references(system: System, known: Sequence[System]) -> list[System]:
    """Return the systems of one node that are most like this one: form, memory, submitter, round."""

    def distance(other: System) -> float:
        differs = other.memory_gb and system.memory_gb and other.memory_gb != system.memory_gb
        return (
            100 * (other.generation != system.generation)
            + 200 * (other.like != system.like)
            + 3 * (other.is_pcie != system.is_pcie)
            + 2 * bool(differs)
            + 2 * (other.submitter != system.submitter)
            + abs(_round(other) - _round(system))
        )

    nodes = [other for other in known if other.gpus <= _ONE_NODE_GPUS]
    least = min(map(distance, nodes))
    return [other for other in nodes if distance(other) == least]


def _round(system: System) -> int:
    return _ROUNDS.index(system.round) if system.round in _ROUNDS else len(_ROUNDS)


@cache
def _gradients() -> tuple[Gradient, ...]:
    """ResNet-50's, in half precision."""
    with torch.device("meta"):
        network = torchvision.models.resnet50()
        image_NCHW = torch.empty(1, 3, 224, 224)
    return gradients_of(network, lambda: network(image_NCHW), 2)


@cache
def _exposed_ms(gpus: int, like: str, is_pcie: bool, images_ms: int) -> float:
    """Return what backward does not hide of the all-reduce. Whole milliseconds of compute are near enough."""
    backward_s = BACKWARD_SHARE * images_ms / 1000
    nodes = -(-gpus // _ONE_NODE_GPUS)
    link = "pcie" if is_pcie or like == "L40S" else "nvlink"
    node_gb_s = 20.0 if link == "pcie" else _NODE_GB_S.get(like, 20.0)
    network_gb_s = 25.0 if link == "pcie" else _NETWORK_GB_S.get(like, 25.0)
    messages = horovod_messages(_gradients(), ready_times(_gradients(), backward_s))
    return 1000 * exposed_s(messages, backward_s, lambda size: nccl_s(size, gpus, nodes, link, node_gb_s, network_gb_s))


def predicted_ms(system: System, known: Sequence[System], c0_ms: float) -> float:
    """Return c0 + k x images + exposed communication, with k of the systems of one node most like this one."""
    per_image = []
    for node in references(system, known):
        images_ms = node.step_ms - c0_ms
        per_image.append((images_ms - _exposed_ms(node.gpus, node.like, node.is_pcie, round(images_ms))) / node.images)
    images_ms = median(per_image) * system.images
    return c0_ms + images_ms + _exposed_ms(system.gpus, system.like, system.is_pcie, round(images_ms))


def proportional_ms(system: System, known: Sequence[System]) -> float:
    """Return the step time in proportion to that of one node."""
    return median(node.step_ms / node.images for node in references(system, known)) * system.images


def fit_c0_ms(known: Sequence[System]) -> dict[str, float]:
    """Return the c0 of each generation that makes the sum of squared relative errors of its systems of many nodes least."""
    fitted = {}
    for generation in sorted({system.like for system in known if system.gpus >= MANY_GPUS}):
        own = [system for system in known if system.like == generation and system.gpus >= MANY_GPUS]
        fitted[generation] = round(float(_GRID_MS[np.argmin((_errors(own, known) ** 2).sum(axis=0))]), 1)
    return fitted


def left_out_errors(known: Sequence[System]) -> list[float]:
    """Return the relative error of each system of many nodes with the c0 that fits the others of its generation."""
    errors: list[float] = []
    for generation in sorted({system.like for system in known if system.gpus >= MANY_GPUS}):
        own = [system for system in known if system.like == generation and system.gpus >= MANY_GPUS]
        errors_SG = _errors(own, known)
        squares_SG = errors_SG**2
        if len(own) > 1:
            best_S = np.argmin(squares_SG.sum(axis=0) - squares_SG, axis=1)
            errors += [float(row[best]) for row, best in zip(errors_SG, best_S, strict=True)]
    return errors


def _errors(own: Sequence[System], known: Sequence[System]) -> NDArray[np.float64]:
    """Return the relative errors by system and c0. Shape: S systems, G values of c0."""
    return np.array([[abs(predicted_ms(each, known, c0) / each.step_ms - 1) for c0 in _GRID_MS] for each in own])

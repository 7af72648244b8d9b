"""Compare the simulator (training/planning/simulator) with published runs. docs/scaling.md has the results.

python benchmarks/simulator.py                     all of it
python benchmarks/simulator.py --mlperf FILE       steps of MLPerf's ResNet-50 systems of 16 or more GPUs, from such a file
python benchmarks/simulator.py --published         scaling of Horovod's benchmarks and of Goyal et al., with and without experience
python benchmarks/simulator.py --memory            memory of a step against mmaction2's tables
python benchmarks/simulator.py --emulated          steps on emulated nodes with slow links, with torch and Horovod; not in "all"

No GPU, no network. --emulated needs root, iproute2 and Horovod, and takes some minutes. The last lines name every target, and mark
the missed ones.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

import numpy as np
import torch
import torchvision

from benchmarks import common
from benchmarks.common import machine_facts, print_table, write_rows
from benchmarks.simulator_chart import write_chart
from benchmarks.simulator_emulated import COMPUTE, emulated
from benchmarks.simulator_mlperf import (
    C0_MS,
    DATA,
    MANY_GPUS,
    MORE,
    left_out_errors,
    predicted_ms,
    proportional_ms,
    read_systems,
)
from training.config.compose import compose
from training.planning.memory import step_costs
from training.planning.simulator.all_reduce import nccl_s
from training.planning.simulator.overlap import BACKWARD_SHARE, exposed_s, horovod_messages, ready_times
from training.planning.workload import gradients_of
from training.recipe import make_execution

EXPERIENCE = 0.914
Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A figure with the most that it may be."""

    name: str
    value: float
    most: float

    @property
    def is_met(self) -> bool:
        # Of numbers of numpy, which JSON would refuse.
        return bool(self.value <= self.most)

    def row(self) -> Row:
        return {"check": self.name, "value": float(self.value), "target": self.most, "met": self.is_met}

    def __str__(self) -> str:
        return f"{'met   ' if self.is_met else 'MISSED'}  {self.name}: {self.value:.1f}, target {self.most:g} or less"


# --- MLPerf -----------------------------------------------------------------------------------------------------------


def mlperf(path: Path) -> tuple[list[Row], list[Target]]:
    """Predict every system of 16 or more GPUs. Systems of one node come from the file, and from DATA besides."""
    systems = read_systems(path)
    known = list(dict.fromkeys([*systems, *read_systems(DATA)]))
    rows: list[Row] = []
    for system in systems:
        if system.gpus >= MANY_GPUS:
            model = predicted_ms(system, known, C0_MS[system.like])
            rows.append({
                "system": f"{system.round} {system.submitter} {system.name}", "gpus": system.gpus, "images_per_gpu": system.images,
                "step_ms": system.step_ms, "predicted_ms": model, "error_percent": 100 * (model / system.step_ms - 1),
                "proportional_error_percent": 100 * (proportional_ms(system, known) / system.step_ms - 1),
            })  # fmt: skip
    print(f"\nMLPerf ResNet-50, {len(rows)} systems of {MANY_GPUS} or more GPUs in {path}; c0 {C0_MS} ms")
    if not rows:
        return [], []
    titles = ("system", "GPUs", "images", "ms", "predicted", "error %", "proportional %")
    print_table(titles, [_cells(row, "{} {} {:g} {:.2f} {:.2f} {:+.1f} {:+.1f}") for row in rows])
    errors, proportional = (
        np.array([abs(row[key]) for row in rows]) for key in ("error_percent", "proportional_error_percent")
    )
    print(
        f"proportional model: median {np.median(proportional):.1f}%, 90th percentile {np.percentile(proportional, 90):.1f}%; "
        f"within 10%: {int((errors <= 10).sum())} of {len(rows)} here, {int((proportional <= 10).sum())} there"
    )
    if path.resolve() == DATA.resolve():
        left_out = 100 * np.array(left_out_errors([*systems, *read_systems(MORE)]))
        print(
            f"each system left out of the fit of c0: median {np.median(left_out):.1f}%, 90th percentile "
            f"{np.percentile(left_out, 90):.1f}%, {len(left_out)} systems"
        )
    return rows, [
        Target("MLPerf, median error %", float(np.median(errors)), 6.0),
        Target("MLPerf, 90th percentile of the error %", float(np.percentile(errors, 90)), 16.0),
    ]


# --- Horovod and Goyal ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaling:
    """A published weak scaling on P100: images/s of one GPU, and the share of it that many GPUs reach."""

    title: str
    network: str
    size: int
    images: int
    images_per_s: float
    gpus: int
    per_node: int
    link: str
    node_gb_s: float
    network_gb_s: float
    published: float


# Rates: tensorflow docs_src/performance/benchmarks.md, batch 64; ResNet-101's is interpolated between ResNet-50 (219) and
# ResNet-152 (91.8) by their multiply-adds. Horovod: docs/benchmarks.rst, 128 nodes of 4 P100, 25 Gbit/s. Goyal et al.,
# arXiv:1706.02677: 8 GPUs in 29 h, 256 in 1 h, 32 images each, nodes of 8 P100, 50 Gbit/s.
SCALINGS = (
    Scaling("Horovod, Inception V3", "inception_v3", 299, 64, 142, 512, 4, "pcie", 10, 3.125, 0.90),
    Scaling("Horovod, ResNet-101", "resnet101", 224, 64, 129, 512, 4, "pcie", 10, 3.125, 0.90),
    Scaling("Horovod, VGG-16", "vgg16", 224, 64, 154, 512, 4, "pcie", 10, 3.125, 0.68),
    Scaling("Goyal, ResNet-50", "resnet50", 224, 32, 138, 256, 8, "nvlink", 20, 6.25, 29 / 32),
)
# Horovod's defaults of 2017: a cycle of 5 ms, 64 MiB.
_CYCLE_S, _FUSION_BYTES = 5e-3, 64 * 2**20


def predicted_efficiency(case: Scaling) -> float:
    """Return the share of one GPU's rate that each of many reaches."""
    with torch.device("meta"):
        # Its initial weights would take a minute.
        options = {"init_weights": False} if case.network == "inception_v3" else {}
        network = getattr(torchvision.models, case.network)(**options)
        # Batch norm over one value of one image would be refused.
        image_NCHW = torch.empty(2, 3, case.size, case.size)
    gradients = gradients_of(network, lambda: network(image_NCHW), 4)
    alone_s = case.images / case.images_per_s
    backward_s = BACKWARD_SHARE * alone_s
    messages = horovod_messages(gradients, ready_times(gradients, backward_s), _CYCLE_S, _FUSION_BYTES)

    def reduce_s(num_bytes: float) -> float:
        return nccl_s(num_bytes, case.gpus, case.gpus // case.per_node, case.link, case.node_gb_s, case.network_gb_s)

    return float(alone_s / (alone_s + exposed_s(messages, backward_s, reduce_s, reduce_s(64))))


def published() -> tuple[list[Row], list[Target]]:
    """Compare the scaling of four runs."""
    rows: list[Row] = []
    for case in SCALINGS:
        model = 100 * predicted_efficiency(case)
        rows.append({
            "run": f"{case.title}, {case.gpus} P100", "published_percent": 100 * case.published, "predicted_percent": model,
            "with_experience_percent": EXPERIENCE * model, "published_over_predicted": 100 * case.published / model,
        })  # fmt: skip
    print("\nPublished weak scaling")
    titles = ("run", "published %", "predicted %", "with experience %", "published / predicted")
    print_table(titles, [_cells(row, "{} {:.1f} {:.1f} {:.1f} {:.3f}") for row in rows])
    ratios = [row["published_over_predicted"] for row in rows]
    print(f"published / predicted: mean {np.mean(ratios):.3f}, standard deviation {np.std(ratios, ddof=1):.3f}")
    worst, corrected = (
        max(abs(row[key] - row["published_percent"]) for row in rows)
        for key in ("predicted_percent", "with_experience_percent")
    )
    return rows, [
        Target("published scaling, worst error without experience, points", worst, 12.0),
        Target("published scaling, worst error with experience, points", corrected, 4.0),
    ]


# --- Memory -----------------------------------------------------------------------------------------------------------

# mmaction2 v0.24.1, its tables of TSM on V100 (fp32), gpu_mem in MiB: overrides, clips of a GPU, published.
MEMORY: Mapping[str, tuple[str, int, float]] = {
    "ResNet-50, 8 frames": ("model=tsm_resnet50", 8, 7_079),
    "ResNet-50, 16 frames": ("model=tsm_resnet50 model.num_frames=16", 6, 10_404),
    "ResNet-101, 8 frames": ("model=tsm_resnet101", 8, 9_784),
    "ResNet-50 with non-local blocks": ("model=tsm_resnet50_nonlocal", 8, 8_931),
    "MobileNetV2, 8 frames": ("model=tsm_mobilenet_v2", 8, 3_385),
}


def memory() -> tuple[list[Row], list[Target]]:
    """Compare the tensors of a training step with published GPU memory."""
    rows: list[Row] = []
    for title, (overrides, clips, published_mib) in MEMORY.items():
        batch = f"batch.global_batch={clips}", f"batch.bn_group={clips}"
        config = compose(["experiment=kinetics_single_node", *overrides.split(), *batch])
        execution = make_execution(clips, clips, 1)
        costs = step_costs(
            config.model, config.data.num_classes, config.pipeline.size, config.numerics, config.optimizer, execution
        )
        counted_mib = costs.peak_bytes / 2**20
        error = 100 * (counted_mib / published_mib - 1)
        rows.append({
            "network": title, "clips": clips, "counted_mib": counted_mib, "published_mib": published_mib, "error_percent": error,
        })  # fmt: skip
    print("\nMemory of a training step: tensors against mmaction2's gpu_mem (V100, fp32)")
    titles = ("network", "clips", "counted MiB", "published MiB", "error %")
    print_table(titles, [_cells(row, "{} {} {:,.0f} {:,.0f} {:+.1f}") for row in rows])
    return rows, [Target("memory, worst error %", max(abs(row["error_percent"]) for row in rows), 6.0)]


# --- Emulated nodes ---------------------------------------------------------------------------------------------------


def on_emulated_nodes() -> tuple[list[Row], list[Target]]:
    """Compare steps on emulated nodes with those predicted from all-reduces of two nodes."""
    # So that a stop removes the namespaces.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rows, targets = [], []
    for compute, most in zip(COMPUTE, (10.0, 15.0), strict=True):
        found = emulated(compute)
        worst = max(abs(row["error_percent"]) for row in found)
        targets.append(Target(f"emulated nodes, {compute} compute, worst error of a step %", worst, most))
        rows += found
    print("\nSteps on emulated nodes: predicted from a table of two nodes, nothing fitted to steps")
    titles = ("compute", "backend", "nodes", "Mbit/s", "compute ms", "measured ms", "predicted ms", "error %")
    print_table(titles, [_cells(row, "{} {} {} {} {:.0f} {:.0f} {:.0f} {:+.1f}") for row in rows])
    return rows, targets


def _cells(row: Row, formats: str) -> list[str]:
    return [each.format(value) for each, value in zip(formats.split(), row.values(), strict=True)]


def main() -> None:
    parser = common.argument_parser(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--mlperf", type=Path, metavar="FILE", help="MLPerf's systems, as benchmarks/data/mlperf_resnet50.csv"
    )
    parser.add_argument("--published", action="store_true", help="weak scaling of Horovod and Goyal")
    parser.add_argument("--memory", action="store_true", help="memory against mmaction2")
    parser.add_argument("--emulated", action="store_true", help="steps on emulated nodes (root)")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the rows of --mlperf and --published")
    options = parser.parse_args()
    everything = not (options.mlperf or options.published or options.memory or options.emulated)
    facts = machine_facts(torch.get_num_threads())
    parts = []
    if options.mlperf or everything:
        parts.append(mlperf(options.mlperf or DATA))
    if options.published or everything:
        parts.append(published())
    if options.memory or everything:
        parts.append(memory())
    if options.emulated:
        parts.append(on_emulated_nodes())
    rows = [row for found, _ in parts for row in found]
    targets = [target for _, found in parts for target in found]
    print("\n" + "\n".join(map(str, targets)))
    if options.chart:
        write_chart(options.chart, rows)
    if options.json:
        write_rows(options.json, [*rows, *(target.row() for target in targets)], facts)


if __name__ == "__main__":
    main()

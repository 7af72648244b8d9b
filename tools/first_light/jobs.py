"""Complete jobs: train.py end to end, two NCCL ranks on one GPU, Horovod over NCCL, and the programs of benchmarks/."""

import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distributed.checkpoint.store import load_newest
from pipelines.loading.dali_graph import DaliError, import_dali
from runtime import run_layout
from training.telemetry.records import read_metrics

from .processes import Ended, run
from .report import Results
from .settings import Settings

TOLERANCE = 1e-8
"""Maximum relative difference of float64 weights between world sizes, after the steps that FLOAT64 sets."""
FLOAT64 = ("max_steps=20", "numerics.dtype=float64")
SMALL = ("--train-clips", "40", "--val-clips", "20")
AT_ONCE = 3
JOB_LIMIT_S = 150.0


@dataclass(frozen=True)
class Launch:
    """A run of train.py with `launcher` none, torch or horovod, on `ranks` processes that share the first GPU."""

    run_id: str
    overrides: tuple[str, ...]
    launcher: str = "none"
    ranks: int = 1
    data: str = "small"
    """Folder of make_data."""

    def command(self, settings: Settings) -> list[str]:
        train = [
            "train.py", "experiment=smoke", f"distributed.device={settings.device}", "logger=disabled",
            f"outputs={settings.work / 'outputs'}", f"data.root={settings.work / self.data}", f"run_id={self.run_id}",
            *self.overrides,
        ]  # fmt: skip
        # The fake GPU sums nothing, so each rank misses the clips that the other one evaluated.
        if settings.mode == "fake":
            train.append("data.max_bad_clips=20")
        if self.launcher == "torch":
            module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
            return [sys.executable, *module, *train, "distributed=torch"]
        if self.launcher == "horovod":
            horovodrun = str(Path(sys.executable).with_name("horovodrun"))
            return [horovodrun, "--gloo", "-np", str(self.ranks), sys.executable, *train, "distributed=horovod"]
        return [sys.executable, *train]


def ranks(results: Results) -> None:
    """Compare world sizes one and two on one GPU, torch and Horovod over NCCL, with one process in float64."""
    settings = results.settings
    make_data(results, "ranks", *SMALL)
    float64 = FLOAT64 if not settings.tiny else ("max_steps=2", "numerics.dtype=float64")
    mixed = ("max_steps=20", "numerics=gpu_fp16", "distributed.gradient_dtype=float16", "optimizer=lars")
    launches = {
        "float64, one process": Launch("f64", float64),
        "float64, two ranks, torch": Launch("f64_torch", float64, "torch", 2),
        "float64, two ranks, horovod": Launch("f64_horovod", float64, "horovod", 2),
        "fp16, fp16 gradients, lars, two ranks, torch": Launch("fp16_torch", mixed, "torch", 2),
        "float64, one rank, torch": Launch("f64_torch_1", float64, "torch", 1),
        "float64, one rank, horovod": Launch("f64_horovod_1", float64, "horovod", 1),
    }
    if settings.tiny:
        launches = dict(list(launches.items())[:2])
    launches = {title: replace(launch, data="ranks") for title, launch in launches.items()}
    ended_well = run_launches(results, launches)
    for title, launch in launches.items():
        if launch.overrides == float64 and launch.launcher != "none":
            compare_weights(results, f"{title}: weights", "f64", launch.run_id, ended_well, TOLERANCE)


def jobs(results: Results) -> None:
    """Run train.py end to end: the smoke experiment to its accuracy, twice bit-identical, in each precision, and resumed."""
    settings = results.settings
    make_data(results, "small", *SMALL)
    if not settings.tiny:
        make_data(results, "whole")
    steps = "max_steps=2" if settings.tiny else "max_steps=20"
    deterministic = (steps, "numerics.deterministic=true")
    launches = {
        "smoke experiment to its end": Launch("smoke", ("pipeline.workers=4",), data="whole"),
        "deterministic, first": Launch("deterministic_1", deterministic),
        "deterministic, second": Launch("deterministic_2", deterministic),
        "bf16, lars": Launch("bf16", (steps, "numerics=gpu", "optimizer=lars")),
        "fp16": Launch("fp16", (steps, "numerics=gpu_fp16")),
        "batch norm over ranks, torch, one rank": Launch("over_ranks", (steps,), "torch"),
    }
    if settings.tiny:
        launches = {title: launches[title] for title in ("deterministic, first", "deterministic, second")}
    ended_well = run_launches(results, launches)
    compare_weights(results, "deterministic: weights", "deterministic_1", "deterministic_2", ended_well, 0.0)


def dali_job(results: Results) -> None:
    """Train on batches of DALI, which decodes on the device, and on those of the host, from the same seeds."""
    settings = results.settings
    try:
        import_dali()
        if settings.mode == "fake":
            raise DaliError("the fake GPU decodes no video")
    except DaliError as error:
        with results.row("DALI") as row:
            row["skipped"] = str(error)
        return
    make_data(results, "dali", *SMALL)
    steps = "max_steps=2" if settings.tiny else "max_steps=40"
    launches = {
        title: Launch(run_id, (steps, f"pipeline={pipeline}", "numerics=gpu"), data="dali")
        for title, run_id, pipeline in (("DALI", "dali", "dali"), ("the host's workers", "host", "torch"))
    }
    run_launches(results, launches)


def make_data(results: Results, name: str, *sizes: str) -> None:
    """Generate a data set of shapes; a complete one is kept."""
    settings = results.settings
    with results.row(f"data, {name}") as row:
        command: list[str | Path] = [sys.executable, "prepare.py", "shapes", "--root", settings.work / name, *sizes]
        ended = run(command, min(90.0, settings.left_s()))
        _note(row, ended)


def run_launches(results: Results, launches: Mapping[str, Launch]) -> set[str]:
    """Run all launches, several at a time: they are checked, not timed. Return the run_ids of those that ended well."""
    settings = results.settings
    ended_well = set()
    with ThreadPoolExecutor(1 if settings.tiny else AT_ONCE) as pool:
        running = {pool.submit(run_launch, settings, launch): title for title, launch in launches.items()}
        for future in as_completed(running):
            with results.row(running[future]) as row:
                row |= future.result()
                if row["outcome"] == "ok":
                    ended_well.add(launches[running[future]].run_id)
    return ended_well


def compare_weights(results: Results, title: str, one: str, other: str, ended_well: set[str], tolerance: float) -> None:
    """Report how far the weights of two runs are apart, if both have ended well."""
    with results.row(title) as row:
        if not {one, other} <= ended_well:
            row["skipped"] = "one of the runs did not end well"
            return
        row["relative"] = relative_difference(results.settings, one, other)
        row["tolerance"] = tolerance
        row["equal"] = row["relative"] <= tolerance


def run_launch(settings: Settings, launch: Launch) -> dict[str, Any]:
    """Run train.py and return its outcome and the accuracy of its last evaluation."""
    fields: dict[str, Any] = {}
    if settings.left_s() < 2:
        return {"outcome": "no time", "skipped": "no time"}
    environment = {"OMP_NUM_THREADS": "1" if settings.tiny else "2"}
    # The fake GPU's kernels fill no tensors. Without the caching allocator they are 0, so that evaluations find numbers.
    if settings.mode == "fake":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if launch.ranks > 1 and settings.device == "cuda":
        environment["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    if launch.launcher != "none" and settings.nccl is not None and settings.mode == "gpu":
        environment["LD_PRELOAD"] = str(settings.nccl)
    _note(fields, run(launch.command(settings), min(JOB_LIMIT_S, settings.left_s()), environment))
    metrics = settings.work / "outputs" / launch.run_id / run_layout.METRICS
    if metrics.exists():
        found = [record for record in read_metrics(metrics) if record["kind"] == "evaluation"]
        fields["evaluation"] = found[-1] if found else None
    return fields


def _note(row: dict[str, Any], ended: Ended) -> None:
    row |= {"outcome": ended.outcome, "duration_s": ended.duration_s}
    if ended.outcome == "ok":
        row["output"] = ended.output[-700:]
    else:
        row["error"] = f"{ended.outcome}\n{ended.output[-4000:]}"


def relative_difference(settings: Settings, one: str, other: str) -> float:
    """Return the largest difference between the tensors of two runs' last checkpoints, relative to each tensor's maximum.

    Raises ValueError if one of them has no complete checkpoint, or if they contain different tensors.
    """
    left, right = (last_tensors(settings.work / "outputs" / run_id) for run_id in (one, other))
    if left.keys() != right.keys():
        raise ValueError(f"{one} and {other} hold different tensors: {sorted(left.keys() ^ right.keys())[:5]}")
    return max(
        ((left[name] - right[name]).abs().max() / left[name].abs().max().clamp_min(1e-30)).item() for name in left
    )


def last_tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint, broken = load_newest(folder / run_layout.CHECKPOINTS)
    if checkpoint is None:
        raise ValueError(f"{folder.name} has no whole checkpoint {broken}")
    tensors = checkpoint.network | checkpoint.optimizer
    return {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}


def benchmarks(results: Results) -> None:
    """Run the programs of benchmarks/ unchanged."""
    settings = results.settings
    programs = {
        "step": ["benchmarks/step.py", "--only", "single", "--batch", "8", "--size", "224", "--blocks", "8"],
        "shift": [
            "benchmarks/shift.py",
            "--layout",
            "channels_last",
            "--only",
            "training",
            "--clips",
            "8",
            "--rounds",
            "8",
        ],
        "optimizer": ["benchmarks/optimizer.py"],
    }
    if settings.tiny:
        programs = {"optimizer": ["benchmarks/optimizer.py", "--quick", "--backbone", "resnet18"]}
    for title, program in results.each(programs):
        with results.row(title) as row:
            target = settings.work / f"{title}.json"
            options: list[str | Path] = ["--device", settings.device, "--json", target]
            _note(row, run([sys.executable, *program, *options], settings.left_s() - 1))
            if target.exists():
                row["rows"] = json.loads(target.read_text())

"""What each process of a test world does; tests/test_worlds.py checks what comes back. Results are plain JSON."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from distributed.backend import Backend, ReducerOptions
from distributed.batch_norm import average_running_statistics, convert_batch_norm
from distributed.control import ControlChannel
from distributed.topology import find_topology
from training import schema
from training.errors import ConfigError
from training.job import Job, build_job, check_agreement
from training.loop import score, train
from training.main import join_world
from training.records import Records
from training.schema import Config

CHECKOUT = Path(__file__).parent.parent

# 20 steps of float64 over real clips: the design's equivalence test. 40 clips, 8 a step.
EQUIVALENCE = [
    "experiment=smoke",
    "logger=disabled",
    "logger.every_steps=5",
    "pipeline.decoder=pyav",
    "pipeline.workers=0",
    "pipeline.size=24",
    "model.num_frames=4",
    "batch.global_batch=8",
    "schedule.epochs=4",
    "schedule.warmup_epochs=1",
    "optimizer.lr=0.02",
    "model.dropout=0.5",
    "numerics.dtype=float64",
    "evaluation.every_epochs=100",
    "evaluation.batch=7",
    "checkpoint.every_epochs=2",
]

# name -> overrides; every one is trained in every world
VARIANTS = {
    "whole_world": ["numerics.channels_last=true"],
    "groups_of_4": ["batch.bn_group=4"],
    "groups_of_2_accumulated": ["batch.bn_group=2", "batch.micro_batch=2", "optimizer.clip_norm=1"],
}


@dataclass(frozen=True)
class Context:
    folder: Path
    backend: Backend
    control: ControlChannel


def compose_config(*overrides: str) -> Config:
    with initialize_config_dir(str(CHECKOUT / "conf"), version_base="1.3"):
        return schema.from_composed(compose("config", overrides=list(overrides)))


def start(folder: Path) -> Context:
    schema.register()
    torch.set_num_threads(1)
    backend = join_world(compose_config("experiment=smoke"), find_topology())
    return Context(folder, backend, ControlChannel(backend))


def config_for(context: Context, run_id: str, *overrides: str) -> Config:
    data = f"data.root={context.folder.parent / 'clips'}"
    return compose_config(*EQUIVALENCE, data, f"outputs={context.folder}", f"run_id={run_id}", *overrides)


def trained(context: Context, run_id: str, *overrides: str) -> Job:
    """Train a run to its end (or max_steps) as train.py does; its checkpoint stays in the folder."""
    config = config_for(context, run_id, *overrides)
    torch.manual_seed(config.seed)
    job = build_job(config, context.backend, context.control)
    if context.backend.topology.rank == 0:
        job.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    context.backend.barrier()
    records = Records(config, job.folder, context.backend.topology.rank == 0, job.first_step, job.recipe.total_steps)
    assert train(job, records) == 0
    records.close(0)
    return job


def equivalence(context: Context) -> dict[str, Any]:
    """Train every variant; and what the trained network scores."""
    scores = {}
    for name, overrides in VARIANTS.items():
        job = trained(context, name, *overrides)
        scores[name] = score(job, job.recipe.total_steps).scores.as_dict()
    return scores


def resumed(context: Context) -> bool:
    """Go on from the checkpoint at step 10 of `whole_world`, as if that run had ended there."""
    if context.backend.topology.rank == 0:
        half_way = "checkpoints/step-00000010"
        shutil.copytree(context.folder / "whole_world" / half_way, context.folder / "resumed" / half_way)
    context.backend.barrier()
    return trained(context, "resumed", *VARIANTS["whole_world"]).first_step == 10


def deterministic(context: Context) -> list[str]:
    """Two whole runs and one that was stopped, in the deterministic mode: which tensors differ in any bit."""
    options = ["numerics.deterministic=true", "numerics.dtype=float32", "schedule.epochs=2"]
    first = trained(context, "deterministic-1", *options)
    second = trained(context, "deterministic-2", *options)
    trained(context, "deterministic-3", *options, "max_steps=3")
    third = trained(context, "deterministic-3", *options)
    torch.use_deterministic_algorithms(False)
    states = [job.trainer.network.state_dict() for job in (first, second, third)]
    return [f"{i + 2}: {name}" for i in (0, 1) for name in states[0] if not states[0][name].equal(states[i + 1][name])]


def collectives(context: Context) -> dict[str, Any]:
    """Sums, broadcasts and gathers of known values."""
    backend = context.backend
    rank, size = backend.topology.rank, backend.topology.size
    total = torch.full((3,), float(rank + 1), dtype=torch.float64)
    backend.all_reduce_(total, "test.sum")
    sent = torch.full((2,), float(rank + 5))
    backend.broadcast_(sent, "test.broadcast")
    halves = [list(range(size // 2)), list(range(size // 2, size))] if size > 1 else [[0]]
    group = backend.group(halves)
    assert group is not None
    within = torch.ones(1) * (rank + 1)
    backend.all_reduce_(within, "test.group", group)
    return {
        "sum": total.tolist(),
        "broadcast": sent.tolist(),
        "group": [list(group.ranks), within.item()],
        "object": backend.broadcast_object({"from": rank}),
        "objects": backend.all_gather_objects([rank, "x" * rank]),
    }


def half_wire(context: Context) -> float:
    """The largest gradient that fp16 can hold on every rank must come through the average unharmed."""
    parameter = nn.Linear(4, 1, bias=False)
    reducer = context.backend.reducer(parameter, ReducerOptions(half_wire=True))
    with reducer.micro_step(last=True):
        (reducer.network(torch.ones(1, 4)) * 60000.0).sum().backward()
    reducer.finish()
    assert parameter.weight.grad is not None and parameter.weight.grad.dtype == torch.float32
    return parameter.weight.grad.max().item()


def running_statistics(context: Context) -> list[float]:
    """Ghost groups with accumulation: running statistics after averaging are those of all groups of the step."""
    size, rank = context.backend.topology.size, context.backend.topology.rank
    norm = nn.Sequential(nn.BatchNorm2d(3)).double()
    convert_batch_norm(norm, context.backend, ghosts=4 // size, rank_groups=[], accumulation=2)
    x_NCHW = torch.randn(16, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for micro_NCHW in x_NCHW.chunk(2):
        norm(micro_NCHW.chunk(size)[rank])
    average_running_statistics(norm, context.backend)
    child: Any = norm[0]
    return [*child.running_mean.tolist(), *child.running_var.tolist()]


def disagreement(context: Context) -> str:
    """The last rank comes with another seed: every rank must hear which key and rank."""
    backend = context.backend
    config = config_for(context, "none")
    if backend.topology.size > 1 and backend.topology.rank == backend.topology.size - 1:
        config.seed = 99
    try:
        check_agreement(backend, config, ["same"])
    except ConfigError as error:
        return str(error)
    return ""


def missing_at_barrier(context: Context) -> str:
    """Rank 0 waits for a rank that does not come."""
    topology = context.backend.topology
    message = ""
    if topology.size > 1 and topology.rank == 0:
        try:
            context.control.barrier("nobody", timeout_s=0.5)
        except TimeoutError as error:
            message = str(error)
    context.backend.barrier()
    return message


def agreed_stop(context: Context) -> list[int]:
    """The last rank wants to stop at step 3; every rank must leave behind the same step."""
    topology = context.backend.topology
    for step in range(20):
        context.backend.barrier()  # stands for the step's reduction
        wanted = "SIGUSR1" if step >= 3 and topology.rank == topology.size - 1 else None
        if context.control.agreed_stop(step, 0, wanted) is not None:
            return [step]
    return []


def no_leftovers(context: Context) -> bool:
    """Rank 0 drops the runs' larger files, so that a test session does not fill the disk."""
    if context.backend.topology.rank == 0:
        for optimizer in context.folder.glob("*/checkpoints/*/optimizer.safetensors"):
            optimizer.unlink()
        for run in context.folder.glob("deterministic-*"):
            shutil.rmtree(run)
    return True


BODIES: list[Callable[[Context], Any]] = [
    collectives,
    half_wire,
    running_statistics,
    disagreement,
    missing_at_barrier,
    equivalence,
    resumed,
    deterministic,
    agreed_stop,
    no_leftovers,
]

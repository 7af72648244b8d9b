"""Test bodies that run on every rank of a test world and return plain JSON; tests/distributed/test_worlds.py checks it."""

import functools
import math
import os
import shutil
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import training.config.compose
import training.job
from distributed.backends.base import Backend, ReducerOptions
from distributed.batch_norm.layer import convert_batch_norm
from distributed.batch_norm.running_statistics import average_running_statistics
from distributed.health.control_channel import ControlChannel
from distributed.topology import find_topology
from pipelines.loading.clips import ClipBatch, EvaluationClips
from pipelines.stream.augmentation import dropout_seeds
from tests.helpers.processes import listening, processes_with
from tests.helpers.worlds import MARK
from training.build.data import make_loader, open_manifest, protocol_of, source_of
from training.build.normalise import Normaliser
from training.config.compose import compose
from training.config.schema import Config
from training.errors import ConfigError, DivergedError
from training.evaluation.continuous import evaluate_stream
from training.evaluation.validate import evaluate_weights
from training.job import Job, build_job
from training.loop import train
from training.main import join_world
from training.optim.gradient_diagnostics import GradientDiagnostics
from training.optim.optimizers import optimizer_tensors
from training.runs.resume import check_agreement
from training.telemetry.metrics_log import MetricsLog
from tsm.networks import TemporalNetwork, build_network
from tsm.streaming import streaming_network

from .bodies_batch_norm import batch_norm_over_ranks

CHECKOUT = Path(__file__).parents[2]

# The design's equivalence test: 20 steps in float64 over 40 real clips, 8 per step.
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

LARS = ["optimizer.name=lars", "optimizer.lr=4", "optimizer.label_smoothing=0.1"]
AVERAGE = "optimizer.ema_decay=0.8"
STREAM = [
    "model.direction=past",
    "pipeline.sampling=stream",
    "pipeline.burn_in=3",
    "pipeline.distances=[1,2,3]",
    "pipeline.loss_from=2",
]
# Name -> overrides. Every variant is trained in every world: the first with the published ResNet-18, the others with a
# narrow one. The first has half the frames, since a float64 convolution reads all weights again for each image.
VARIANTS = {
    "whole_world": ["numerics.channels_last=true", "model.num_frames=2"],
    "groups_of_4": [*LARS, "batch.bn_group=4", "batch.precise_bn_steps=2"],
    "stream": [
        *LARS,
        *STREAM,
        "batch.bn_group=4",
        "batch.micro_batch=4",
        "batch.precise_bn_steps=1",
        "schedule.epochs=2",
    ],
    "groups_of_2_accumulated": [*LARS, "batch.bn_group=2", "batch.micro_batch=2", "optimizer.clip_norm=1", AVERAGE],
}

# In this variant the last rank takes so much longer for each step. Its batch norm is local in every world.
SLOWED_VARIANT, SLOWED_S = "groups_of_2_accumulated", 0.1


@dataclass(frozen=True)
class Context:
    folder: Path
    backend: Backend
    control: ControlChannel


def compose_config(*overrides: str) -> Config:
    return compose(overrides)


def start(folder: Path) -> Context:
    # Saves a second for each job that is built.
    training.job.code_version = functools.cache(training.job.code_version)
    read_conf = functools.cache(training.config.compose._from_conf)
    training.config.compose._from_conf = lambda groups, extra: deepcopy(read_conf(tuple(groups), extra))
    torch.set_num_threads(1)
    topology = find_topology()
    backend = join_world(
        compose_config("experiment=smoke", "pipeline.workers=0"), topology, rank_groups=halves(topology.size)
    )
    return Context(folder, backend, ControlChannel(backend))


def wait_for_all(backend: Backend) -> None:
    """Barrier: return when every rank has called this."""
    backend.all_gather_objects(None)


def halves(size: int) -> list[list[int]]:
    """Return the rank groups that all bodies use in addition to the whole world."""
    return [list(range(size // 2)), list(range(size // 2, size))] if size > 1 else [[0]]


def config_for(context: Context, run_id: str, *overrides: str) -> Config:
    data = f"data.root={context.folder.parent / 'clips'}"
    return compose_config(*EQUIVALENCE, data, f"outputs={context.folder}", f"run_id={run_id}", *overrides)


def narrowed(network: TemporalNetwork) -> TemporalNetwork:
    """Reduce a network to a quarter of its channels with random weights: the same tensor names, a tenth of the time.

    Float64 convolutions are slow, and a ResNet-18 has 11 M parameters to reduce and to save.
    """
    for name, module in list(network.named_modules()):
        small: nn.Module
        if isinstance(module, nn.Conv2d):
            channels = 3 if module.in_channels == 3 else module.in_channels // 4, module.out_channels // 4
            small = nn.Conv2d(*channels, module.kernel_size, module.stride, module.padding, bias=False)  # type: ignore[arg-type]
            # The temporal shift.
            small._forward_pre_hooks = module._forward_pre_hooks
        elif isinstance(module, nn.BatchNorm2d):
            small = nn.BatchNorm2d(module.num_features // 4)
        elif isinstance(module, nn.Linear):
            small = nn.Linear(module.in_features // 4, module.out_features)
        else:
            continue
        network.set_submodule(name, small)
    return network


def narrow_network(*arguments: Any) -> TemporalNetwork:
    """Build a narrow network, without weights for the full one that it is made of."""
    with torch.device("meta"):
        network = build_network(*arguments)
    return narrowed(network)


def job_of(context: Context, run_id: str, *overrides: str, narrow: bool = False) -> Job:
    config = config_for(context, run_id, *overrides)
    torch.manual_seed(config.seed)
    build = narrow_network if narrow else build_network
    with patch("training.build.model.build_network", build):
        return build_job(config, context.backend, context.control)


def trained(
    context: Context,
    run_id: str,
    *overrides: str,
    spoiled: tuple[int, ...] = (),
    slowed_s: float = 0.0,
    narrow: bool = False,
) -> Job:
    """Train a run to its end (or max_steps) as train.py does; its checkpoint stays in the folder.

    In the steps `spoiled` the last rank's clips are non-finite. `slowed_s`: further time that it takes for each step.
    """
    job = job_of(context, run_id, *overrides, narrow=narrow)
    config, take_step = job.config, job.trainer.step

    def step(
        number: int, batches: list[ClipBatch], diagnostics: GradientDiagnostics | None, mark: Callable[[str], None]
    ) -> Tensor:
        last = context.backend.topology.rank == context.backend.topology.size - 1
        if number in spoiled and last:
            batches = [damaged(batch, math.inf) for batch in batches]
        if last:
            time.sleep(slowed_s)
        return take_step(number, batches, diagnostics, mark)

    job.trainer.step = step  # type: ignore[method-assign, assignment]
    if context.backend.topology.rank == 0:
        job.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    wait_for_all(context.backend)
    records = MetricsLog(config, job.folder, context.backend.topology.rank == 0, job.first_step, job.recipe.total_steps)
    assert train(job, records) == 0
    records.close(0)
    return job


def equivalence(context: Context) -> dict[str, Any]:
    """Train every variant and return its evaluation scores.

    A world of one process also trains the narrow variants with the whole batch as one group.
    """
    scores = {}
    for name, overrides in VARIANTS.items():
        narrow = name != "whole_world"
        job = trained(context, name, *overrides, slowed_s=SLOWED_S if name == SLOWED_VARIANT else 0.0, narrow=narrow)
        scores[name] = evaluate_weights(job, job.recipe.total_steps).scores.as_dict()
        if context.backend.topology.size == 1 and narrow:
            whole = [
                option
                for option in overrides
                if option.partition("=")[0] not in ("batch.bn_group", "batch.micro_batch")
            ]
            trained(context, f"{name}_whole", *whole, narrow=True)
    return scores


def resumed(context: Context) -> bool:
    """Resume `groups_of_4` from its checkpoint at step 10, as if the run had ended there, and save with every record."""
    if context.backend.topology.rank == 0:
        half_way = "checkpoints/step-00000010"
        shutil.copytree(context.folder / "groups_of_4" / half_way, context.folder / "resumed" / half_way)
    wait_for_all(context.backend)
    minutes = "checkpoint.every_minutes=0.0001"
    return trained(context, "resumed", *VARIANTS["groups_of_4"], minutes, narrow=True).first_step == 10


def deterministic(context: Context) -> list[str]:
    """Return the tensors that differ in any bit, in deterministic mode, between an uninterrupted and a resumed run.

    Each run has 7 steps, once with batch norm over all ranks and once, on clips after a burn-in, within each rank. The
    uninterrupted run saves only at its end. The other also saves after steps 2, 4 and 6, and its first start ends after
    step 3, within an epoch.
    """
    options = [*LARS, AVERAGE, "numerics.deterministic=true", "numerics.dtype=float32", "schedule.epochs=2"]
    differing = []
    for kind, group in (("whole", []), ("local", ["batch.bn_group=2", *STREAM])):
        run_id, left_alone = f"deterministic-{kind}", f"deterministic-{kind}-alone"
        expected = state_of(trained(context, left_alone, *options, *group, "max_steps=7", narrow=True))
        for stop in ("max_steps=3", "max_steps=7"):
            job = trained(context, run_id, *options, *group, "checkpoint.every_steps=2", stop, narrow=True)
        found = state_of(job)
        differing += [f"{kind}: {key}" for key in expected if not expected[key].equal(found[key])]
    torch.use_deterministic_algorithms(False)
    return differing


def continuous_stream(context: Context) -> list[Any]:
    """Return what a narrow past-only network predicts on a continuous stream, with two streams on each rank."""
    config = config_for(
        context, "stream", "model.direction=past", "evaluation=stream", "evaluation.batch=2", "evaluation.distances=[5]"
    )
    torch.manual_seed(0)
    network = narrowed(build_network("resnet18", config.data.num_classes, direction="past")).double()
    nn.init.normal_(network.classifier.weight)
    manifest = open_manifest(config.data, "val")
    source = source_of(config.pipeline, manifest, context.backend.device, 0.0)
    clips = EvaluationClips(source, protocol_of(config.model, config.pipeline, config.evaluation))
    answers = evaluate_stream(
        streaming_network(network),
        Normaliser(context.backend.device, config.numerics),
        clips,
        make_loader(config.pipeline, clips, context.backend),
        context.backend,
        config.evaluation,
    )
    return [answers.predicted_NDPR.tolist(), answers.seen_N.tolist(), len(answers.missing)]


def collectives(context: Context) -> dict[str, Any]:
    """Sum, broadcast and gather known values."""
    backend = context.backend
    rank, size = backend.topology.rank, backend.topology.size
    total = torch.full((3,), float(rank + 1), dtype=torch.float64)
    backend.all_reduce_(total, "test.sum")
    sent = torch.full((2,), float(rank + 5))
    backend.broadcast_(sent, "test.broadcast")
    group = backend.group(halves(size))
    assert group is not None
    within = torch.ones(1) * (rank + 1)
    backend.all_reduce_(within, "test.group", group)
    try:
        backend.all_gather_objects((rank,))
        refused = ""
    except TypeError as error:
        refused = str(error)
    # As evaluations do.
    with torch.inference_mode():
        in_inference_mode = backend.all_gather_objects(rank)
    return {
        "sum": total.tolist(),
        "broadcast": sent.tolist(),
        "group": [list(group.ranks), within.item()],
        "object": backend.broadcast_object({"from": rank, "loss": [0.1, math.inf]}),
        "refused": refused,
        "objects": backend.all_gather_objects([rank, "x" * rank]),
        "in_inference_mode": in_inference_mode,
    }


def listening_sockets(context: Context) -> list[tuple[str, str]]:
    """The addresses on which the whole job listens, seen by rank 0 while all ranks run."""
    found = listening(processes_with(MARK, os.environ[MARK])) if context.backend.topology.rank == 0 else set()
    wait_for_all(context.backend)
    return sorted(found)


def running_statistics(context: Context) -> list[float]:
    """Average running statistics of ghost groups over accumulation: the result covers all groups of the step."""
    size, rank = context.backend.topology.size, context.backend.topology.rank
    norm = nn.Sequential(nn.BatchNorm2d(3)).double()
    convert_batch_norm(norm, context.backend, ghosts=4 // size, rank_groups=[], accumulation=2)
    x_NCHW = torch.randn(16, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for micro_NCHW in x_NCHW.chunk(2):
        norm(micro_NCHW.chunk(size)[rank])
    average_running_statistics(norm, context.backend)
    child: Any = norm[0]
    return [*child.running_mean.tolist(), *child.running_var.tolist()]


def damaged(batch: ClipBatch, value: float) -> ClipBatch:
    """Return the clips with one value that no uint8 video can hold."""
    video_NTCHW = batch.video_NTCHW.double()
    video_NTCHW[0, 0, 0, 7, 7] = value
    return replace(batch, video_NTCHW=video_NTCHW)


def state_of(job: Job) -> dict[str, Tensor]:
    """Copy weights, running statistics and optimizer state."""
    network = job.trainer.network
    live = network.state_dict() | optimizer_tensors(network, job.trainer.optimizer)
    return {name: tensor.clone() for name, tensor in live.items()}


def bad_steps(context: Context) -> dict[str, Any]:
    """Take three steps with non-finite clips on the last rank in the second, and compare with a run of steps 1 and 3.

    Groups of 2 clips keep batch norm local in every world, so the other ranks' running statistics stay finite. With
    1e200 the variances overflow, but the last rank's loss and gradients stay finite.
    """
    backend = context.backend
    last = backend.topology.rank == backend.topology.size - 1
    options = ["batch.bn_group=2", "optimizer.clip_norm=1"]
    results: dict[str, Any] = {"flags": [], "changed": [], "differences": []}
    ends = []
    for value in (None, math.inf, 1e200):
        job = job_of(context, "none", *options, narrow=True)
        batches = job.loader(job.training_clips).batches(job.execution.stream_positions(backend.topology.rank, 0, 3))
        flags = []
        for step in range(3):
            batch = next(batches)
            before = state_of(job)
            if step == 1 and value is None:
                continue
            spoiled = step == 1 and last and value is not None
            flags.append(job.trainer.step(step, [damaged(batch, value) if spoiled and value else batch])[3].item())
            if step == 1:
                results["changed"] += [name for name, tensor in state_of(job).items() if not tensor.equal(before[name])]
        results["flags"].append(flags)
        ends.append(state_of(job))
    for end in ends[1:]:
        results["differences"].append(max((end[name] - ends[0][name]).abs().max().item() for name in end))
    return results


def bad_steps_in_a_run(context: Context) -> list[str]:
    """Recover from skipped steps in one run, and abort after three in a row in another; return each rank's outcome.

    Training records are due at steps 2, 4 and 6, checkpoints at 5 and 6.
    """
    options = ["batch.bn_group=2", "numerics.max_bad_steps_in_a_row=3", "checkpoint.every_epochs=1"]
    options += ["logger.every_steps=2", "logger.diagnostics=true"]
    ended = []
    for run_id, spoiled in (("recovering", (0, 1, 3)), ("diverging", (2, 3, 4))):
        try:
            trained(context, run_id, *options, "max_steps=6", spoiled=spoiled, narrow=True)
            ended.append("done")
        except DivergedError as error:
            ended.append(str(error))
    return ended


def scaled_and_clipped(context: Context) -> float:
    """Take two steps of two micro-steps with a loss scale and constant clipping; return the sum of absolute weights."""
    options = ["batch.bn_group=2", "batch.micro_batch=2", "optimizer.clip_norm=0.1"]
    job = job_of(context, "none", *options, narrow=True)
    trainer = job.trainer
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batches = job.loader(job.training_clips).batches(
        job.execution.stream_positions(context.backend.topology.rank, 0, 2)
    )
    for step in range(2):
        assert trainer.step(step, [next(batches) for _ in range(job.execution.accumulation)])[3] == 0
    return float(sum(parameter.detach().abs().sum() for parameter in trainer.network.parameters()))


def measured_step(context: Context) -> dict[str, Any]:
    """Measure a step with LARS, clipping, a loss scale and micro-steps, and return the same values from plain autograd."""
    backend = context.backend
    options = ["batch.bn_group=2", "batch.micro_batch=2", "optimizer.name=lars", "optimizer.clip_norm=0.1"]
    job = job_of(context, "none", *options, narrow=True)
    trainer, network = job.trainer, job.trainer.network
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batches = job.loader(job.training_clips).batches(job.execution.stream_positions(backend.topology.rank, 0, 1))
    micro_batches = [next(batches) for _ in range(job.execution.accumulation)]
    names = [name for name, _ in network.named_parameters()]
    squares = []
    mean = [torch.zeros(parameter.shape, dtype=parameter.dtype) for parameter in network.parameters()]
    for micro_step, batch in enumerate(micro_batches):
        slot_N = job.execution.slots(backend.topology.rank, micro_step)
        network.dropout.seed_N = torch.from_numpy(dropout_seeds(job.recipe.seed, 0, slot_N))
        loss = nn.functional.cross_entropy(network(trainer.normalise(batch.video_NTCHW)), batch.label_N)
        # Runs no hook of DDP or Horovod.
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        squares.append(sum(gradient.square().sum().item() for gradient in gradients))
        for total, gradient in zip(mean, gradients, strict=True):
            total += gradient / job.execution.accumulation / backend.topology.size
    for name, total in zip(names, mean, strict=True):
        backend.all_reduce_(total, f"test.{name}")
    small_square = sum(backend.all_gather_objects(squares[0])) / backend.topology.size
    norms = {name: total.norm().item() for name, total in zip(names, mean, strict=True)}
    weights = {name: parameter.norm().item() for name, parameter in network.named_parameters()}
    diagnostics = GradientDiagnostics(network, trainer.optimizer, backend, job.execution)
    assert trainer.step(0, micro_batches, diagnostics)[3] == 0
    return {"values": diagnostics.values(), "small_square": small_square, "norms": norms, "weights": weights}


def fp16_compression(context: Context) -> dict[str, float]:
    """Average gradients whose mean fits fp16 although their sum or largest part does not."""
    backend = context.backend
    rank, size = backend.topology.rank, backend.topology.size

    def mean(gradient: float, deterministic: bool = False) -> float:
        layer = nn.Linear(4, 1, bias=False)
        reducer = backend.reducer(layer, ReducerOptions(fp16_compression=True, deterministic=deterministic))
        with reducer.micro_step(last=True):
            (reducer.network(torch.ones(1, 4)) * gradient).sum().backward()
        reducer.finish()
        assert layer.weight.grad is not None
        return layer.weight.grad.max().item()

    bare = torch.full((4,), 60000.0, dtype=torch.float16)
    backend.all_reduce_(bare, "test.half")
    return {
        "alike": mean(60000.0),
        "in fixed groups": mean(60000.0, deterministic=True),
        "one of them large": mean(60000.0 * size if rank == 0 else 0.0),
        "too large": mean(70000.0 * size if rank == 0 else 0.0),
        "sum of fp16": bare.max().item(),
    }


def reduced_gradients(context: Context) -> dict[str, list[float]]:
    """Average gradients that Horovod cannot reduce as they are: bf16, channels_last, over several micro-steps."""
    backend = context.backend
    value = float(backend.topology.rank + 1)
    means = {}
    for name, layer in (
        ("bfloat16", nn.Conv2d(2, 2, 2, bias=False, dtype=torch.bfloat16)),
        ("channels_last", nn.Conv2d(2, 2, 2, bias=False).to(memory_format=torch.channels_last)),  # type: ignore[call-overload]
    ):
        reducer = backend.reducer(layer, ReducerOptions(accumulation=2))
        optimizer = _Plain(list(layer.parameters()), 1.0)
        nn.init.zeros_(layer.weight)
        # In the second pass there are gradients to clear.
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            for last in (False, True):
                with reducer.micro_step(last):
                    x_BCHW = torch.arange(8.0).view(1, 2, 2, 2).to(layer.weight) * value * (1 + last)
                    (reducer.network(x_BCHW).sum() / 2).backward()
            reducer.finish()
            optimizer.step()
        means[name] = (-layer.weight / 2).flatten().tolist()
    return means


class _Plain(torch.optim.Optimizer):
    """Gradient descent whose rate has no default, so that the optimizer cannot be rebuilt from its parameters only."""

    def __init__(self, params: list[nn.Parameter], rate: float) -> None:
        super().__init__(params, {"rate": rate})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad * group["rate"])


def disagreement(context: Context) -> str:
    """Give the last rank another seed; every rank's error must name the key and the rank."""
    backend = context.backend
    config = config_for(context, "none")
    if backend.topology.size > 1 and backend.topology.rank == backend.topology.size - 1:
        config.seed = 99
    try:
        check_agreement(backend, asdict(config))
    except ConfigError as error:
        return str(error)
    return ""


def stop_reasons(context: Context) -> list[str]:
    """Request stops after `agreed_stop`: the last rank's reason came first and counts on all ranks."""
    own = f"too late, from rank {context.backend.topology.rank}"
    context.control.request_stop(own)
    wanted = "SIGUSR1" if context.backend.topology.size == 1 else own
    wait_for_all(context.backend)
    assert context.control.stop_wanted(wanted)
    return [context.control.stop_reason()]


def agreed_stop(context: Context) -> list[int]:
    """Request a stop on the last rank at step 3; every rank must stop after the same step."""
    topology = context.backend.topology
    # More steps than pass until the monitor has relayed the request.
    for step in range(2000):
        context.backend.all_reduce_(torch.zeros(1), "test.step")
        wanted = "SIGUSR1" if step >= 3 and topology.rank == topology.size - 1 else None
        if context.control.agreed_stop(step, 0, wanted) is not None:
            return [step]
    return []


def no_leftovers(context: Context) -> bool:
    """Remove the runs' larger files on rank 0, so that a test session does not fill the disk."""
    if context.backend.topology.rank == 0:
        for optimizer in context.folder.glob("*/checkpoints/*/optimizer.safetensors"):
            # The link to the best checkpoint lists a file a second time.
            optimizer.unlink(missing_ok=True)
        for run in context.folder.glob("deterministic-*"):
            shutil.rmtree(run)
    return True


BODIES: list[Callable[[Context], Any]] = [
    collectives,
    continuous_stream,
    listening_sockets,
    running_statistics,
    batch_norm_over_ranks,
    disagreement,
    equivalence,
    resumed,
    deterministic,
    bad_steps,
    bad_steps_in_a_run,
    scaled_and_clipped,
    measured_step,
    fp16_compression,
    reduced_gradients,
    no_leftovers,
    # Last, because an agreed stop is final and would end every later run.
    agreed_stop,
    stop_reasons,
]

"""Measure the overhead of the training loop and its reducers against the same step in plain PyTorch.

python benchmarks/step.py                          all comparisons
python benchmarks/step.py --only single            only the loop, in one process
python benchmarks/step.py --quick --json FILE      a minute, for a first impression

`training.loop.train` runs unchanged on batches in memory. The plain loop runs in turns inside the iterator that yields these
batches, so that both see the same state of the machine, block by block. It has the same network with nn.BatchNorm2d, DDP for two
processes, the fused SGD, and no more: no metrics, no schedule, no records, no signal handling.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import common
from distributed.backends.base import Backend
from distributed.backends.ddp import without_buffer_sync
from distributed.backends.make import make_backend, pick_device
from distributed.health.control_channel import ControlChannel
from distributed.topology import find_topology
from pipelines.loading.clips import ClipBatch
from pipelines.loading.worker_loader import ClipLoader
from pipelines.manifest import ManifestRow, write_manifest
from training.build.numerics import set_numerics
from training.config import schema
from training.job import Job, build_job
from training.loop import train
from training.telemetry.metrics_log import MetricsLog
from tsm.networks import build_network

NUM_CLASSES = 10
WARM_UP_STEPS = 3
DISTINCT_BATCHES = 4
# Epochs between evaluations or checkpoints; neither is measured.
NEVER = 1_000_000
# Ratio of the training loop to the plain loop, in one process.
TARGET = 1.01


@dataclass(frozen=True)
class Setting:
    """Sizes of the measurement: `blocks` pairs of blocks of `block_steps` steps.

    `batch` clips per step over all processes, each with `frames` frames of `size` x `size` pixels.
    """

    batch: int
    size: int
    frames: int
    blocks: int
    block_steps: int
    threads: int
    device: str

    @property
    def steps(self) -> int:
        """Number of steps for `train`, one more than the blocks need, so that it does not stop inside the last block."""
        return WARM_UP_STEPS + self.blocks * self.block_steps + 1


@dataclass(frozen=True)
class Launch:
    """Processes of one backend and their comparisons: a title, and True for batch norm synchronized over all processes."""

    backend: str
    size: int
    comparisons: tuple[tuple[str, bool], ...]


LAUNCHES = (
    Launch("single", 1, (("training loop / plain loop", False),)),
    Launch("torch", 2, (("torch reducer / plain DDP", False), ("  + BN over both processes", True))),
    Launch("horovod", 2, (("Horovod reducer / plain DDP", False), ("  + BN over both processes", True))),
)


# ----------------------------------------------------------------------------------------------- in the measured processes


class TurnTaking(ClipLoader):
    """A loader that yields batches from memory to `train` and times its blocks, alternating with plain steps."""

    def __init__(self, setting: Setting, batches: list[ClipBatch], plain_step: Callable[[ClipBatch], None]) -> None:
        self._setting = setting
        self._batches = batches
        self._plain_step = plain_step
        self.ours: list[common.Clock] = []
        self.plain: list[common.Clock] = []

    def batches(self, batch_indices: Iterable[Any]) -> Iterator[ClipBatch]:
        supply = itertools.cycle(self._batches)
        steps = self._setting.block_steps
        yield from itertools.islice(supply, WARM_UP_STEPS)
        self._take_plain_steps(itertools.islice(supply, WARM_UP_STEPS))
        for block in range(self._setting.blocks):
            for ours in (True, False) if block % 2 == 0 else (False, True):
                start = common.Clock.now(self._setting.device)
                if ours:
                    # `train` asks for the next batch only after a whole step.
                    yield from itertools.islice(supply, steps)
                else:
                    self._take_plain_steps(itertools.islice(supply, steps))
                (self.ours if ours else self.plain).append(common.Clock.now(self._setting.device).since(start, steps))
        yield next(supply)

    def _take_plain_steps(self, batches: Iterable[ClipBatch]) -> None:
        for batch in batches:
            self._plain_step(batch)


@dataclass
class MemoryJob(Job):
    """A job as `build_job` makes it, except for the source of its batches."""

    turns: TurnTaking | None = None

    def loader(self, dataset: object) -> ClipLoader:
        assert self.turns is not None
        return self.turns


def make_plain_step(config: schema.Config, setting: Setting, backend: Backend) -> Callable[[ClipBatch], None]:
    """Return the plain loop's step. DDP gets its fastest options: no broadcast of buffers, gradients as bucket views."""
    device = backend.device
    network: nn.Module = build_network(config.model.backbone, NUM_CLASSES, setting.frames).to(device).train()
    if backend.topology.size > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True, **without_buffer_sync())
    optimizer = torch.optim.SGD(
        network.parameters(), lr=config.optimizer.lr, momentum=0.9, weight_decay=1e-4, fused=True
    )
    mean_C11 = torch.tensor([123.675, 116.28, 103.53], device=device).view(3, 1, 1)
    std_C11 = torch.tensor([58.395, 57.12, 57.375], device=device).view(3, 1, 1)

    def step(batch: ClipBatch) -> None:
        optimizer.zero_grad(set_to_none=True)
        video_NTCHW = batch.video_NTCHW.to(device, non_blocking=True).float().sub_(mean_C11).div_(std_C11)
        logit_NK = network(video_NTCHW)
        loss: Tensor = nn.functional.cross_entropy(logit_NK, batch.label_N.to(device, non_blocking=True))
        loss.backward()
        optimizer.step()

    return step


def make_batches(setting: Setting, clips: int, rank: int) -> list[ClipBatch]:
    """Return random batches for one process's part of the global batch."""
    generator = torch.Generator().manual_seed(rank)
    shape = (clips, setting.frames, 3, setting.size, setting.size)
    return [
        ClipBatch(
            video_NTCHW=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            label_N=torch.randint(0, NUM_CLASSES, (clips,), generator=generator),
            row_N=torch.arange(clips),
            real_N=torch.ones(clips, dtype=torch.bool),
        )
        for _ in range(DISTINCT_BATCHES)
    ]


def make_config(setting: Setting, bn_group: int, folder: Path, run_id: str) -> schema.Config:
    """Return the smoke run's recipe without evaluations or checkpoints, with a training record per block."""
    return schema.Config(
        model=schema.ModelConfig(backbone="resnet18", num_frames=setting.frames),
        data=schema.DataConfig(name="memory", root=str(folder), num_classes=NUM_CLASSES),
        pipeline=schema.PipelineConfig(decoder="pyav", size=setting.size),
        batch=schema.BatchConfig(global_batch=setting.batch, bn_group=bn_group),
        optimizer=schema.OptimizerConfig(lr=0.01, base_batch=setting.batch),
        schedule=schema.ScheduleConfig(epochs=2 * setting.steps, warmup_epochs=setting.steps),
        logger=schema.LoggerConfig(wandb="disabled", every_steps=setting.block_steps),
        checkpoint=schema.CheckpointConfig(every_epochs=NEVER),
        evaluation=schema.EvaluationConfig(every_epochs=NEVER),
        outputs=str(folder),
        run_id=run_id,
        max_steps=setting.steps,
    )


def compare(setting: Setting, backend: Backend, control: ControlChannel, config: schema.Config) -> TurnTaking:
    """Run `train` on a job of this configuration, alternating with the plain loop."""
    set_numerics(config.numerics, config.seed)
    job = build_job(config, backend, control)
    batches = make_batches(setting, job.execution.micro_batch, backend.topology.rank)
    turns = TurnTaking(setting, batches, make_plain_step(config, setting, backend))
    if backend.topology.rank == 0:
        job.folder.checkpoints.mkdir(parents=True)
    records = MetricsLog(config, job.folder, backend.topology.rank == 0, 0, job.recipe.total_steps)
    train(MemoryJob(**vars(job), turns=turns), records)
    records.close(0)
    return turns


def work(launch: Launch, setting: Setting, folder: Path) -> None:
    """Measure on one rank; rank 0 writes `{title: {"ours", "plain"}}` to `folder`."""
    torch.set_num_threads(setting.threads)
    topology = find_topology()
    device = pick_device(setting.device if launch.size == 1 else "cpu", topology)
    backend = make_backend(launch.backend, topology, device, timeout_s=120.0)
    # Plain DDP runs in the same processes as Horovod.
    if launch.backend == "horovod":
        store = dist.FileStore(str(folder / "store"), topology.size)
        dist.init_process_group("gloo", store=store, rank=topology.rank, world_size=topology.size)
    control = ControlChannel(backend)
    measured = {}
    for number, (title, synchronized) in enumerate(launch.comparisons):
        bn_group = setting.batch if synchronized else setting.batch // topology.size
        config = make_config(setting, bn_group, folder, f"{launch.backend}-{number}")
        turns = compare(setting, backend, control, config)
        measured[title] = {"ours": list(map(asdict, turns.ours)), "plain": list(map(asdict, turns.plain))}
    if topology.rank == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    control.close()
    if launch.backend == "horovod":
        dist.destroy_process_group()
    backend.close()


# ------------------------------------------------------------------------------------------------- in the benchmark itself


def measure(launch: Launch, setting: Setting) -> list[dict[str, Any]]:
    """Start the processes of a launch and return their measurements as rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row = ManifestRow("none.mp4", 0, 1, 0, setting.frames, "h264", setting.size, setting.size, 0)
        for split in ("train", "val"):
            write_manifest(folder / f"{split}.arrow", [row] * setting.batch, list(map(str, range(NUM_CLASSES))))
        order = json.dumps([launch.backend, asdict(setting), name, os.getpid()])
        environ = {"OMP_NUM_THREADS": str(setting.threads)}
        common.run_child(
            [*common.launch_command(launch.backend, launch.size, __file__), "--worker", order], folder / "log", environ
        )
        measured = json.loads((folder / "measured.json").read_text())
    return [
        row_of(
            title, launch, setting, *([common.Clock(**sample) for sample in samples[who]] for who in ("ours", "plain"))
        )
        for title, samples in measured.items()
    ]


def row_of(
    title: str, launch: Launch, setting: Setting, ours: list[common.Clock], plain: list[common.Clock]
) -> dict[str, Any]:
    ours_wall_s, plain_wall_s = [clock.wall_s for clock in ours], [clock.wall_s for clock in plain]
    return {
        "benchmark": "step",
        "comparison": title.strip(),
        "backend": launch.backend,
        "processes": launch.size,
        **asdict(setting),
        "ours_s": common.median_interval(ours_wall_s),
        "plain_s": common.median_interval(plain_wall_s),
        "ratio": common.ratio_interval(ours_wall_s, plain_wall_s),
        "cpu_ratio": common.ratio_interval([clock.cpu_s for clock in ours], [clock.cpu_s for clock in plain]),
    }


def show(row: dict[str, Any], title: str) -> list[str]:
    return [
        title,
        row["ours_s"].show(1000),
        row["plain_s"].show(1000),
        row["ratio"].show(digits=3),
        row["cpu_ratio"].show(digits=3),
    ]


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser("The cost of the training loop, of its reducers, and of synchronized batch norm.")
    parser.add_argument("--only", choices=[launch.backend for launch in LAUNCHES], help="one of the launches")
    parser.add_argument("--batch", type=int, default=16, help="clips of a step, over all processes")
    parser.add_argument("--size", type=int, default=56, help="side of a frame in pixels")
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip")
    parser.add_argument("--blocks", type=int, default=30, help="pairs of blocks")
    parser.add_argument("--block-steps", type=int, default=2, help="steps of a block")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the comparison in one process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.worker:
        backend, setting, folder, parent = json.loads(options.worker)
        common.end_with(parent)
        launch = next(launch for launch in LAUNCHES if launch.backend == backend)
        work(launch, Setting(**setting), Path(folder))
        return 0
    if options.quick:
        options.batch, options.blocks, options.block_steps = 4, 6, 1
    names = ("batch", "size", "frames", "blocks", "block_steps", "threads", "device")
    setting = Setting(**{name: getattr(options, name) for name in names})
    facts = common.machine_facts(setting.threads)
    rows, shown, failures = [], [], 0
    for launch in LAUNCHES:
        if options.only not in (None, launch.backend):
            continue
        print(f"measuring {launch.backend}, {launch.size} process{'es' if launch.size > 1 else ''} ...", flush=True)
        try:
            measured = measure(launch, setting)
        except FileNotFoundError as error:
            print(f"left out, {error.filename} is not there. Fix: make horovod", file=sys.stderr, flush=True)
            continue
        except common.ChildFailed as error:
            print(error, file=sys.stderr, flush=True)
            failures += 1
            continue
        rows += measured
        shown += [show(row, title) for row, (title, _) in zip(measured, launch.comparisons, strict=True)]
    print_results(shown, setting, facts)
    if options.json:
        common.write_rows(options.json, rows, facts)
    return int(failures > 0)


def print_results(shown: list[list[str]], setting: Setting, facts: dict[str, Any]) -> None:
    print(
        f"\nTSM ResNet-18, {setting.batch} clips a step x {setting.frames} frames x {setting.size} px; "
        f"{setting.blocks} pairs of blocks of {setting.block_steps} steps"
        f"\n{facts['cpu']}, {facts['cores']} cores, load {facts['load']}; torch {facts['torch']}, "
        f"{setting.threads} thread(s) a process; {facts['date']}"
        "\nmedian [its 95% interval]; ratios within each pair of blocks\n"
    )
    common.print_table(("comparison", "ours [ms/step]", "plain [ms/step]", "ratio", "ratio of CPU time"), shown)
    print(f"\ntarget of the training loop: a ratio of {TARGET} or less")


if __name__ == "__main__":
    sys.exit(main())

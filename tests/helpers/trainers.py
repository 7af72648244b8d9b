"""Trainers of this project over random clips, for tests of steps on any device."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from distributed.backends.base import ReducerOptions
from distributed.backends.single import SingleBackend
from distributed.batch_norm.layer import convert_batch_norm
from distributed.topology import Topology
from pipelines.loading.clips import ClipBatch
from training.build.normalise import Normaliser
from training.build.numerics import place_network
from training.config.schema import NumericsConfig, OptimizerConfig
from training.optim.lars import Lars
from training.optim.optimizers import DeviceStepCount, make_optimizer, parameter_groups
from training.recipe import Recipe, make_execution
from training.schedule import Schedule
from training.step import Trainer
from tsm.networks import TemporalNetwork, build_network

CLIPS, CLASSES, FRAMES = 4, 5, 2


def optimizer_of(network: TemporalNetwork, name: str) -> torch.optim.Optimizer:
    """Make an optimizer by its name in the configuration, or a variant of one.

    `nesterov` is SGD with Nesterov momentum. `lars flat` and `lamb on a device` are the GPU variants on any device.
    """
    config = OptimizerConfig(name=name.split()[0], weight_decay=1e-2, lr=1.0)
    if name == "nesterov":
        config = replace(config, name="sgd", nesterov=True)
    if config.name == "lamb":
        pytest.importorskip("timm", reason="LAMB is timm's: make dev installs it")
    if name == "lars flat":
        groups = parameter_groups(network, config)
        for group in groups:
            group["adapt"] = group["name"].endswith(".weight")
        return Lars(groups, flat=True)
    optimizer = make_optimizer(network, config)
    if name == "lamb on a device":
        for group in optimizer.param_groups:
            group["step"] = DeviceStepCount(group["params"][0].device)
    return optimizer


def trainer_of(
    name: str = "sgd",
    micro_batch: int = CLIPS,
    *,
    clips: int = CLIPS,
    device: str = "cpu",
    amp: str = "off",
    channels_last: bool = False,
    bn_group: int | None = None,
    over_ranks: bool = False,
    backbone: str = "resnet18",
    frames: int = FRAMES,
    classes: int = CLASSES,
    dtype: str = "float32",
    network_options: dict[str, Any] | None = None,
    **changes: Any,
) -> Trainer:
    """Make a trainer in one process; `changes` replace fields of Trainer.

    `bn_group` is the number of clips in a batch-norm group (None: a micro-batch). `over_ranks` uses rank groups, of
    which there is one.
    """
    backend = SingleBackend(Topology("none", 0, 1, 0, 1, 0, "here"), torch.device(device))
    schedule = Schedule(
        "constant", peak=0.1, total_steps=9, warmup_steps=0, warmup_start=0.0, milestone_steps=(), factor=1.0, end=0.0
    )
    bn_clips = bn_group or micro_batch
    recipe = Recipe(
        seed=0, global_batch=clips, bn_group=bn_clips, total_steps=9, num_rows=99, manifest_digest="", schedule=schedule,
        model={}, optimizer={}, augmentation={}, numerics={},
    )  # fmt: skip
    execution = make_execution(clips, bn_clips, 1, micro_batch)
    torch.manual_seed(0)
    network = build_network(backbone, classes, num_frames=frames, **network_options or {})
    rank_groups = [[0]] if over_ranks else []
    convert_batch_norm(network, backend, execution.bn_ghosts, rank_groups, execution.accumulation)
    numerics = NumericsConfig(dtype=dtype, amp=amp, channels_last=channels_last)
    place_network(network, backend.device, numerics)
    settings: dict[str, Any] = {
        "scaler": torch.amp.GradScaler(backend.device.type, enabled=amp == "float16"),
        "amp": amp,
        "clip_norm": None,
        "label_smoothing": 0.0,
        "ema": None,
    }
    return Trainer(
        recipe=recipe,
        execution=execution,
        rank=0,
        network=network.train(),
        optimizer=optimizer_of(network, name),
        reducer=backend.reducer(network, ReducerOptions(execution.accumulation)),
        normalise=Normaliser(backend.device, numerics),
        **settings | changes,
    )


def batches_of(
    trainer: Trainer, step: int, damage: float | None = None, micro_step: int = 0, size: int = 32, burn_in: int = 0
) -> list[ClipBatch]:
    """Return random clips, after frames of burn-in.

    `damage` replaces one value of a micro-step's video, so that gradients or statistics overflow.
    """
    generator = torch.Generator().manual_seed(step)
    batches = []
    for number in range(trainer.execution.accumulation):
        clips, frames = trainer.execution.micro_batch, burn_in + trainer.network.num_frames
        video_NTCHW = torch.randint(256, (clips, frames, 3, size, size), dtype=torch.uint8, generator=generator)
        if damage is not None and number == micro_step:
            video_NTCHW = video_NTCHW.float()
            video_NTCHW[0, 0, 0, 5, 5] = damage
        label_N = torch.randint(CLASSES, (clips,), generator=generator)
        batches.append(ClipBatch(video_NTCHW, label_N, torch.arange(clips), torch.ones(clips, dtype=torch.bool)))
    return batches

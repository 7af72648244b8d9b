"""A run folder that looks trained: random weights, a recipe and class names, written in a second."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from distributed.backends.single import SingleBackend
from distributed.checkpoint.store import Checkpoint, Snapshot, write_snapshot
from distributed.topology import Topology
from tests.training.config.test_config import config_of
from training.build.class_names import digest_of
from training.build.model import network_of
from training.build.numerics import parameter_dtype
from training.config.load import from_composed
from training.config.schema import Config
from training.evaluation.command import evaluate_task
from training.evaluation.run_argument import config_of_run
from training.optim.ema import PREFIX
from training.runs.run_folder import RunFolder

SMALL = (
    "experiment=smoke pipeline.size=32 pipeline.workers=0 pipeline.decoder=pyav model.num_frames=4 distributed=single"
)


def write_run(folder: Path, classes: Sequence[str], *overrides: str, step: int = 5) -> Config:
    """Write a run into `folder` and return its configuration. With optimizer.ema_decay its EMA differs from its weights."""
    config = config_of(*SMALL.split(), f"data.num_classes={len(classes)}", f"run_id={folder.name}", *overrides)
    torch.manual_seed(step)
    network = network_of(config.model, len(classes)).to(parameter_dtype(config.numerics))
    for name, tensor in network.named_buffers():
        # As after training: batch norm is not the identity.
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if name.endswith("var") else tensor.uniform_(-0.5, 0.5)
    ema = {}
    if config.optimizer.ema_decay is not None:
        ema = {PREFIX + name: 0.9 * weight.detach() for name, weight in network.named_parameters()}
    recipe = {
        "model": asdict(config.model),
        "optimizer": asdict(config.optimizer),
        "augmentation": {"size": config.pipeline.size, "sampling": config.pipeline.sampling},
        "numerics": {"dtype": config.numerics.dtype},
    }
    state = {"step": step, "recipe": recipe, "classes": list(classes), "classes_sha256": digest_of(classes)}
    run = RunFolder(folder)
    run.write_config(config)
    run.checkpoints.mkdir(exist_ok=True)
    write_snapshot(run.checkpoints, Snapshot().take(Checkpoint(network.state_dict(), ema, state)), keep=9, best=True)
    return config


def evaluate_here(run: Path, *overrides: str) -> int:
    """Evaluate a run in this process as `evaluate.py --run` does; return the exit code."""
    config = from_composed(config_of_run(overrides, str(run)))
    backend = SingleBackend(Topology("none", 0, 1, 0, 1, 0, "here"), torch.device("cpu"))
    control: Any = SimpleNamespace(progress=lambda *_: None)
    return evaluate_task(config, backend, control)

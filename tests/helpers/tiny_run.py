"""A run folder that looks trained: random weights, a recipe and class names, written in a second."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from distributed.checkpoint.store import Checkpoint, Snapshot, write_snapshot
from tests.training.config.test_config import config_of
from training.build.class_names import digest_of
from training.build.model import network_of
from training.build.numerics import parameter_dtype
from training.config.schema import Config
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

"""Resume a run: find its newest checkpoint, check that recipe and code are the same, restore the state."""

import hashlib
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

from distributed.backends.base import Backend, broadcast_network
from distributed.batch_norm.running_statistics import set_running_statistics
from distributed.checkpoint.store import Checkpoint, UnreadableError, load_newest
from pipelines.manifest import Manifest
from runtime.checkout import CHECKOUT
from training.build.class_names import UNNAMED, checkpoint_classes, first_difference
from training.build.init_weights import InitialWeights, find_initial_weights
from training.config.keys import leaves
from training.config.schema import CheckpointConfig, ModelConfig
from training.errors import ConfigError, StorageError
from training.optim.ema import EMA, PREFIX
from training.optim.optimizers import optimizer_tensors
from training.recipe import LEFT_OUT_OF_MODEL, Recipe
from tsm.networks import TemporalNetwork

from .code_version import check_code
from .run_folder import RunFolder

STATISTICS_BY_RANK = "batch_norm.statistics_by_rank"
"""Tensor name of the running statistics of every rank in checkpoints of deterministic mode. Shape (ranks, statistics)."""

READ_RETRIES_S = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Waits between attempts to read checkpoints: a file server's fail-over takes seconds."""


def check_agreement(backend: Backend, settings: dict[str, Any]) -> None:
    """Raise ConfigError on all ranks if their settings differ; the message names ranks and keys. Collective."""
    text = json.dumps(dict(leaves(settings)), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    digests = backend.all_gather_objects(digest)
    if len(set(digests)) == 1:
        return
    usual = max(sorted(set(digests)), key=digests.count)
    odd = [rank for rank, digest in enumerate(digests) if digest != usual]
    others = backend.all_gather_objects(json.loads(text))
    reference = others[digests.index(usual)]
    differing = sorted({key for rank in odd for key in reference if others[rank][key] != reference[key]})
    shown = "; ".join(
        f"{key}: {reference[key]!r} but on rank {rank} {others[rank][key]!r}"
        for key in differing[:5]
        for rank in odd[:1]
        if others[rank][key] != reference[key]
    )
    raise ConfigError(
        f"ranks {odd} of {len(digests)} were started with another configuration or other data than the rest ({shown}). "
        "Fix: start all ranks with the same command, and give every node the same data"
    )


def state_tensors(network: TemporalNetwork, optimizer: torch.optim.Optimizer, ema: EMA | None) -> dict[str, Tensor]:
    """Return the live tensors that a checkpoint holds beside the network, by name."""
    return optimizer_tensors(network, optimizer) | (ema.tensors() if ema else {})


def newest_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """Load a run's newest whole checkpoint, if any, and log the broken ones that were skipped.

    Raises StorageError when checkpoints are there and their file system fails to read them, for a while.
    """
    return _whole_and_broken(folder)[0]


def _whole_and_broken(folder: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    for wait_s in (*READ_RETRIES_S, None):
        try:
            checkpoint, broken = load_newest(folder.checkpoints)
            break
        except UnreadableError as error:
            if wait_s is None:
                raise StorageError(
                    f"{error}, tried {len(READ_RETRIES_S) + 1} times. Not starting at step 0, because checkpoints are there. "
                    "Fix: bring the file system back, then start the run again"
                ) from error
            print(f"{error}; trying again in {wait_s:g} s", file=sys.stderr, flush=True)
            time.sleep(wait_s)
    for line in broken:
        print(f"skipped checkpoint: {line}", flush=True)
    return checkpoint, broken


def find_start(
    model: ModelConfig, settings: CheckpointConfig, folder: RunFolder
) -> tuple[Checkpoint | None, InitialWeights]:
    """On rank 0: find the checkpoint that this run resumes from, if any, and the run's initial weights.

    Raises ConfigError when the run has checkpoints and none is whole, StorageError when none can be read.
    """
    checkpoint, broken = _whole_and_broken(folder)
    if checkpoint is None and broken and not settings.allow_restart:
        raise ConfigError(
            f"none of the {len(broken)} checkpoints in {folder.checkpoints} is whole ({broken[0]}). Fix: restore one from a copy, "
            "or checkpoint.allow_restart=true to train from step 0 again, which will replace them"
        )
    before = None if checkpoint is None else checkpoint.state["recipe"]["model"].get("init", "random")
    return checkpoint, find_initial_weights(model, CHECKOUT, before)


def check_same(
    settings: CheckpointConfig,
    deterministic: bool,
    recipe: Recipe,
    code: dict[str, Any],
    folder: RunFolder,
    checkpoint: Checkpoint,
) -> None:
    """On rank 0: raise ConfigError if recipe or code differ from the checkpoint's, unless the configuration allows it."""
    before, now = (
        {f"model.{key}": value for key, value in LEFT_OUT_OF_MODEL.items()} | dict(leaves(each))
        for each in (checkpoint.state["recipe"], recipe.as_dict())
    )
    differing = [key for key in now if now[key] != before.get(key)]
    if differing and not settings.allow_recipe_change:
        shown = "; ".join(f"{key}: {before.get(key)!r} then, {now[key]!r} now" for key in differing[:8])
        raise ConfigError(
            f"{folder.path} holds a run of another recipe ({shown}). "
            "Fix: choose another run_id, or resume with checkpoint.allow_recipe_change=true"
        )
    check_code(settings, deterministic, code, folder, checkpoint)
    print(f"resuming {folder.path.name} from step {checkpoint.state['step']}", flush=True)


def check_classes(folder: RunFolder, checkpoint: Checkpoint, training: Manifest | None) -> None:
    """On rank 0: raise ConfigError if the run was trained on other classes, or on the same ones with other numbers."""
    if training is None:
        return
    theirs = checkpoint_classes(checkpoint.state, folder.path, training.path)
    if theirs is None:
        print(f"{folder.path.name}: {UNNAMED}", flush=True)
    elif theirs != training.classes:
        difference = first_difference(training.classes, str(training.path), theirs, "the run")
        raise ConfigError(
            f"{folder.path} holds a run of other classes: {difference}. Fix: choose another run_id; model.init=CHECKPOINT "
            "starts from the run's weights and maps classes by name"
        )


def restore(backend: Backend, network: TemporalNetwork, live: dict[str, Tensor], checkpoint: Checkpoint | None) -> None:
    """Copy the checkpoint that rank 0 read into the network and the `live` tensors (`state_tensors`) of every rank.

    State that the checkpoint lacks, because its recipe had none, starts as in a new run: the EMA from the weights, an
    optimizer from zero. Raises ConfigError if the checkpoint is of a network with other shapes.
    """
    if checkpoint is not None:
        try:
            network.load_state_dict(checkpoint.network)
        except RuntimeError as error:
            raise ConfigError(
                f"the checkpoint is of another network: {error}. "
                "Fix: choose another run_id, and start from these weights with model.init=FOLDER"
            ) from error
        initial = {PREFIX + name: weight.detach() for name, weight in network.named_parameters()}
        absent = [name for name in live if name not in checkpoint.optimizer]
        for name, tensor in live.items():
            tensor.copy_(checkpoint.optimizer.get(name, initial.get(name, tensor)))
        if absent:
            kinds = ", ".join(
                sorted({"the EMA of weights" if name in initial else name.split(".")[-1] for name in absent})
            )
            print(f"the checkpoint has no state for {kinds}: it starts as in a new run", flush=True)
    broadcast_network(backend, network)
    for name, tensor in live.items():
        dense = tensor.contiguous()
        backend.broadcast_(dense, f"optimizer.{name}")
        tensor.copy_(dense)


def restore_own_statistics(backend: Backend, network: TemporalNetwork, checkpoint: Checkpoint | None) -> None:
    """Restore each rank's own running statistics if the checkpoint has them for this world size; else keep their mean."""
    rows_RS = None if checkpoint is None else checkpoint.optimizer.get(STATISTICS_BY_RANK)
    shape = backend.broadcast_object(None if rows_RS is None else list(rows_RS.shape))
    if shape is None or shape[0] != backend.topology.size:
        return
    parameter = next(network.parameters())
    shared_RS = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
    if rows_RS is not None:
        shared_RS.copy_(rows_RS)
    backend.broadcast_(shared_RS, "running_statistics_by_rank")
    set_running_statistics(network, shared_RS[backend.topology.rank])

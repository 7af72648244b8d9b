"""Resume a run from its newest checkpoint."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from distributed.backends.base import Backend, broadcast_network
from distributed.batch_norm.running_statistics import set_running_statistics
from distributed.checkpoint.store import Checkpoint, load_newest
from training.build.data import CHECKOUT
from training.build.init_weights import InitialWeights, find_initial_weights
from training.config.schema import Config
from training.errors import ConfigError
from training.optim.ema import EMA, PREFIX
from training.optim.optimizers import optimizer_tensors
from training.recipe import Recipe
from tsm.networks import TemporalNetwork

from .code_version import check_code
from .run_folder import RunFolder

STATISTICS_BY_RANK = "batch_norm.statistics_by_rank"
"""Name of every rank's own running statistics in a checkpoint of the deterministic mode, shape (ranks, numbers)."""


def check_agreement(backend: Backend, config: Config, manifest_digests: list[str]) -> None:
    """Refuse to train when ranks were started with different configurations or data; names them and the keys."""
    mine = _flat(asdict(config)) | {"(manifest)": manifest_digests}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    digests = backend.all_gather_objects(digest)
    if len(set(digests)) == 1:
        return
    usual = max(sorted(set(digests)), key=digests.count)
    odd = [rank for rank, digest in enumerate(digests) if digest != usual]
    others = backend.all_gather_objects(mine)
    reference = others[digests.index(usual)]
    differing = sorted({key for rank in odd for key in mine if others[rank][key] != reference[key]})
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


def _flat(nested: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def state_tensors(network: TemporalNetwork, optimizer: torch.optim.Optimizer, average: EMA | None) -> dict[str, Tensor]:
    """What a checkpoint holds by name beside the network; the tensors are the live ones."""
    return optimizer_tensors(network, optimizer) | (average.tensors() if average else {})


def newest_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """A run's newest whole checkpoint; says which broken ones were passed over."""
    checkpoint, broken = load_newest(folder.checkpoints)
    for line in broken:
        print(f"passed over: {line}", flush=True)
    return checkpoint


def find_start(config: Config, folder: RunFolder) -> tuple[Checkpoint | None, InitialWeights]:
    """On rank 0: the checkpoint that this run goes on from, if any, and what its first weights are or were."""
    checkpoint = newest_checkpoint(folder)
    before = None if checkpoint is None else checkpoint.state["recipe"]["model"].get("init", "random")
    return checkpoint, find_initial_weights(config.model, CHECKOUT, before)


def check_same(config: Config, recipe: Recipe, code: dict[str, Any], folder: RunFolder, checkpoint: Checkpoint) -> None:
    """On rank 0: refuse to go on from a checkpoint of another recipe or other code, unless the configuration allows it."""
    before, now = checkpoint.state["recipe"], recipe.as_dict()
    before_flat, now_flat = _flat(before), _flat(now)
    differing = [key for key in now_flat if now_flat[key] != before_flat.get(key)]
    if differing and not config.checkpoint.allow_recipe_change:
        shown = "; ".join(f"{key}: {before_flat.get(key)!r} then, {now_flat[key]!r} now" for key in differing[:8])
        raise ConfigError(
            f"{folder.path} holds a run of another recipe ({shown}). "
            "Fix: choose another run_id, or go on with checkpoint.allow_recipe_change=true"
        )
    check_code(config, code, folder, checkpoint)
    print(f"resuming {folder.path.name} from step {checkpoint.state['step']}", flush=True)


def _restore(
    backend: Backend, network: TemporalNetwork, live: dict[str, Tensor], checkpoint: Checkpoint | None
) -> None:
    """Give every rank the checkpoint that rank 0 read; `live`: the tensors of `state_tensors`.

    What another recipe has no state of starts as in a new run: an average from the weights, an optimizer from rest.
    Raises ConfigError for the checkpoint of a network of other shapes.
    """
    if checkpoint is not None:
        try:
            network.load_state_dict(checkpoint.network)
        except RuntimeError as error:
            raise ConfigError(
                f"the checkpoint is of another network: {error}. "
                "Fix: choose another run_id, and start from these weights with model.init=FOLDER"
            ) from error
        first = {PREFIX + name: weight.detach() for name, weight in network.named_parameters()}
        absent = [name for name in live if name not in checkpoint.optimizer]
        for name, tensor in live.items():
            tensor.copy_(checkpoint.optimizer.get(name, first.get(name, tensor)))
        if absent:
            kinds = ", ".join(
                sorted({"the average of weights" if name in first else name.split(".")[-1] for name in absent})
            )
            print(f"the checkpoint has no state for {kinds}: it starts anew", flush=True)
    broadcast_network(backend, network)
    for name, tensor in live.items():
        dense = tensor.contiguous()
        backend.broadcast_(dense, f"optimizer.{name}")
        tensor.copy_(dense)


def _restore_own_statistics(backend: Backend, network: TemporalNetwork, checkpoint: Checkpoint | None) -> None:
    """Each rank's own running statistics, where the checkpoint has them of as many ranks; else they stay the mean."""
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

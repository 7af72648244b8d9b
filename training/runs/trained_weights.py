"""Read the weights that a run is judged by: those of one checkpoint, or their EMA if it has one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distributed.checkpoint.store import BEST, Checkpoint, CheckpointError, load_checkpoint
from training.errors import ConfigError
from training.optim.ema import PREFIX
from tsm.networks import TemporalNetwork
from tsm.official import WeightsError, check_keys

from .resume import newest_checkpoint
from .run_folder import RunFolder


@dataclass(frozen=True)
class TrainedWeights:
    """Tensors by the network's names, with the classifier in the class order of training; `state` is the checkpoint's."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of steps that were taken."""
        return int(self.state["step"])


def read_trained_weights(folder: RunFolder, which: str) -> TrainedWeights:
    """Read the checkpoint `which` of a run (evaluation.checkpoint). Raises ConfigError if there is none."""
    checkpoint = _checkpoint(folder, which)
    ema = {
        name.removeprefix(PREFIX): tensor for name, tensor in checkpoint.optimizer.items() if name.startswith(PREFIX)
    }
    return TrainedWeights(checkpoint.network | ema, checkpoint.state)


def load_into(network: TemporalNetwork, tensors: Mapping[str, Tensor], run: str) -> None:
    """Load a run's tensors into a network. Raises ConfigError if they are of another network; `run` names the run."""
    try:
        check_keys(tensors, network.state_dict())
    except WeightsError as error:
        raise ConfigError(
            f"the checkpoint of {run} is of another network: {error}. Fix: give the overrides that it was trained with"
        ) from error
    network.load_state_dict(tensors)


def _checkpoint(folder: RunFolder, which: str) -> Checkpoint:
    """Load a run's checkpoint: the newest whole one, or exactly the best or the one of this name."""
    if which == "newest":
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None:
            raise ConfigError(
                f"{folder.checkpoints} holds no whole checkpoint. Fix: name the folder of a run that has one, outputs/NAME"
            )
        return checkpoint
    try:
        return load_checkpoint(folder.checkpoints / which)
    except CheckpointError as error:
        why = ": the run was not evaluated yet, or had checkpoint.keep_best=false" if which == BEST else ""
        raise ConfigError(f"{error}{why}. Fix: evaluation.checkpoint=newest") from error

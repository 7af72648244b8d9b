"""Load a trained run for use: its network with the weights that evaluate.py scores, its class names and its settings.

The data that it was trained on may be gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from distributed.backends.make import pick_device
from distributed.backends.single import SingleBackend
from distributed.topology import Topology
from pipelines.stream.eval_views import EvalProtocol
from runtime.checkout import CHECKOUT
from training.build.class_names import checkpoint_classes
from training.build.data import protocol_of
from training.build.model import network_of
from training.build.normalise import Normaliser
from training.build.numerics import check_device, place_network
from training.config.load import from_composed, load_run
from training.config.schema import Config
from training.errors import ConfigError
from training.evaluation.run_argument import config_of_run
from training.evaluation.run_config import differing_views, settings_of
from training.recipe import fingerprint_of
from training.runs.run_folder import RunFolder
from training.runs.trained_weights import TrainedWeights, load_into, read_trained_weights
from tsm.networks import TemporalNetwork

# What belongs to the machine that trained. Every decoder gives the same frames of a scanned video; DALI's pixels differ by
# about a grey level, and it may not be installed here.
# Nothing is logged, so a folder that was moved may have a name that wandb refuses.
_HERE = {
    "distributed.device": "auto",
    "pipeline.loader": "torch",
    "pipeline.decoder": "auto",
    "logger.wandb": "disabled",
}

Network = TypeVar("Network", bound=nn.Module, covariant=True)


@dataclass(frozen=True)
class TrainedRun(Generic[Network]):
    """A trained network, in evaluation mode on its device, and what its inputs and outputs are."""

    folder: Path
    """The run folder, or that of an export."""
    config: Config
    """The run's configuration, with overrides. `model.num_frames` and `pipeline.size` describe the input."""
    network: Network
    classes: list[str]
    """The name of each output."""
    step: int
    recipe: dict[str, Any]
    """The recipe that trained the weights, as their checkpoint has it."""
    backend: SingleBackend
    """The world of this process, with the device."""
    notes: list[str] = field(default_factory=list)
    """Notes for the reader of the predictions, a line each."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the recipe."""
        return fingerprint_of(self.recipe)

    @property
    def protocol(self) -> EvalProtocol:
        """The evaluation protocol: the frames and crops of a video that the network sees."""
        return protocol_of(self.config.model, self.config.pipeline, self.config.evaluation)

    @property
    def normaliser(self) -> Normaliser:
        """Copies uint8 frames to the device and normalises them (MEAN_C and STD_C of training.build.normalise)."""
        return Normaliser(self.device, self.config.numerics, self.config.model.modality)


def load_trained(named: str, overrides: Sequence[str] = ()) -> TrainedRun[TemporalNetwork]:
    """Load the run that `named` leads to, a run folder or one of its checkpoint folders, as `evaluate.py --run` does.

    `overrides`: those of evaluate.py, such as `evaluation=ten_crop`, `evaluation.checkpoint=best` or `distributed.device=cpu`.
    Device, decoder and loader are chosen for this machine, whatever the run had. torch's switches and seed stay as they are
    (`set_numerics`). Raises ConfigError.
    """
    config = from_composed(config_of_run(overrides, named, flag="", here=_HERE))
    assert config.run_id is not None
    folder = RunFolder(CHECKOUT / config.outputs / config.run_id)
    weights = read_trained_weights(folder, config.evaluation.checkpoint)
    recipe = weights.state["recipe"]
    trained = load_run(folder.path)
    trained.logger.wandb = "disabled"
    differing = differing_views(folder.path.name, settings_of(recipe, from_composed(trained)), config)
    notes = [f"differs from the run: {', '.join(map(str, differing))}"] if differing else []
    classes, note = _class_names(weights, folder, config)

    device = pick_device(config.distributed.device, ALONE)
    check_device(config.numerics, config.evaluation, device)
    network = network_of(config.model, len(classes))
    # Before loading, which would round float64 weights to float32.
    place_network(network, device, config.numerics)
    load_into(network, weights.tensors, folder.path.name)
    backend = SingleBackend(ALONE, device)
    return TrainedRun(
        folder.path, config, network.eval(), classes, weights.step, recipe, backend, [*notes, *filter(None, [note])]
    )


def require_rgb(run: str, modality: str) -> None:
    """Raise ConfigError if a network's input is not RGB frames, which are all that a video or a camera gives."""
    if modality != "rgb":
        raise ConfigError(
            f"{run} is a network for model.modality={modality}, and predict.py and stream.py compute no optical flow. Fix: an RGB "
            "run; or compute the flow of the clips with prepare.py, and evaluate.py --run (docs/recipes.md)"
        )


ALONE = Topology("none", rank=0, size=1, local_rank=0, local_size=1, node=0, host="this machine")


def _class_names(weights: TrainedWeights, folder: RunFolder, config: Config) -> tuple[list[str], str]:
    """Return the classes in the order of the outputs, and a note if an old checkpoint has no names: then their numbers."""
    names = checkpoint_classes(weights.state, folder.path, CHECKOUT / config.data.root / config.data.train)
    if names is not None:
        return names, ""
    numbers = [str(number) for number in range(config.data.num_classes)]
    return numbers, f"{folder.path.name} has no class names, and its training manifest is gone: classes are numbers"

"""Build the network that the configuration describes."""

from distributed.backends.base import Backend, broadcast_network
from distributed.batch_norm.layer import convert_batch_norm
from training.config.schema import ModelConfig, NumericsConfig
from training.errors import ConfigError
from training.recipe import Execution
from tsm.networks import TemporalNetwork, build_network

from .init_weights import InitialWeights, load_initial_weights
from .numerics import place_network


def network_of(model: ModelConfig, num_classes: int) -> TemporalNetwork:
    """Build the network with random weights. Raises ConfigError if these settings do not go together."""
    try:
        return build_network(
            model.backbone,
            num_classes,
            model.num_frames,
            model.shift,  # type: ignore[arg-type]
            model.direction,  # type: ignore[arg-type]
            model.fold_div,
            model.temporal_pool,
            model.non_local,
            model.dropout,
            model.partial_bn,
            model.zero_init_gamma,
            model.modality,  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def training_network_of(
    model: ModelConfig,
    classes: list[str],
    numerics: NumericsConfig,
    backend: Backend,
    execution: Execution,
    initial: InitialWeights | None,
) -> tuple[TemporalNetwork, str]:
    """Build the network for training: on its device, with BN over the recipe's groups, and rank 0's weights on every rank.

    `initial`: on rank 0 of a new run, the weights to start from. Returns the network and a summary of what was loaded.
    """
    network = network_of(model, len(classes))
    convert_batch_norm(network, backend, execution.bn_ghosts, execution.bn_rank_groups(), execution.accumulation)
    place_network(network, backend.device, numerics)
    summary = "" if initial is None else load_initial_weights(network, model, initial, classes)
    broadcast_network(backend, network)
    return network.train(), summary

"""Build the network that the configuration describes."""

from distributed.backends.base import Backend, broadcast_network
from distributed.batch_norm.layer import convert_batch_norm
from training.config.schema import Config
from training.errors import ConfigError
from training.recipe import Execution
from tsm.networks import TemporalNetwork, build_network

from .init_weights import InitialWeights, load_initial_weights
from .numerics import place_network


def network_of(config: Config) -> TemporalNetwork:
    """The network that the configuration describes, from random weights. Raises ConfigError for one that cannot be."""
    model = config.model
    try:
        return build_network(
            model.backbone,
            config.data.num_classes,
            model.num_frames,
            model.shift,  # type: ignore[arg-type]
            model.direction,  # type: ignore[arg-type]
            model.fold_div,
            model.temporal_pool,
            model.non_local,
            model.dropout,
            model.partial_bn,
            model.zero_init_gamma,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def _build_network(
    config: Config, backend: Backend, execution: Execution, first: InitialWeights | None
) -> tuple[TemporalNetwork, str]:
    """The network on its device, with batch norm over the recipe's groups, and rank 0's weights everywhere.

    `first`: the weights that rank 0 starts a new run from; the words say what was done with them.
    """
    network = network_of(config)
    convert_batch_norm(network, backend, execution.bn_ghosts, execution.bn_rank_groups(), execution.accumulation)
    place_network(network, backend.device, config.numerics)
    initial_weights = "" if first is None else load_initial_weights(network, config.model, first)
    broadcast_network(backend, network)
    return network.train(), initial_weights

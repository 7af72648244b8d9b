"""Average, gather, recompute and set the running statistics of batch norm."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from distributed.backends.base import Backend

from .layer import GroupBatchNorm, PopulationMoments


@torch.no_grad()
def average_running_statistics(network: nn.Module, backend: Backend) -> None:
    """Set the running statistics of every rank to their mean over ranks, in one message. Call it before evaluation."""
    statistics = _running_statistics(network)
    for name, mean_C in averaged_running_statistics(network, backend).items():
        statistics[name].copy_(mean_C)


@torch.no_grad()
def averaged_running_statistics(network: nn.Module, backend: Backend) -> dict[str, Tensor]:
    """Return the mean over ranks of the running statistics, by their names in the network's state, in one message.

    Changes nothing; returns an empty dict on one rank, or without batch norm over groups.
    """
    statistics = _running_statistics(network)
    if backend.topology.size == 1 or not statistics:
        return {}
    flat = torch.cat(list(statistics.values()))
    backend.all_reduce_(flat, "running_statistics")
    flat /= backend.topology.size
    return dict(zip(statistics, flat.split([len(buffer) for buffer in statistics.values()]), strict=True))


@torch.no_grad()
def own_running_statistics(network: nn.Module) -> Tensor:
    """Return a copy of this rank's running statistics: the numbers of all layers, concatenated."""
    statistics = list(_running_statistics(network).values())
    parameter = next(network.parameters())
    return torch.cat([parameter.new_empty(0), *statistics])


@torch.no_grad()
def running_statistics_by_rank(network: nn.Module, backend: Backend) -> Tensor:
    """Return every rank's own running statistics, on every rank: shape (ranks, numbers of all layers)."""
    row_S = own_running_statistics(network)
    rows_RS = row_S.new_zeros(backend.topology.size, len(row_S))
    if len(row_S):
        rows_RS[backend.topology.rank] = row_S
        # Exact: the other ranks add zeros to this row.
        backend.all_reduce_(rows_RS, "running_statistics_by_rank")
    return rows_RS


@torch.no_grad()
def set_running_statistics(network: nn.Module, row_S: Tensor) -> None:
    """Set this rank's running statistics from `own_running_statistics`. Raises ValueError for those of another network."""
    statistics = list(_running_statistics(network).values())
    lengths = [len(buffer) for buffer in statistics]
    if row_S.shape != (sum(lengths),):
        raise ValueError(f"running statistics of {sum(lengths)} numbers cannot be set from {tuple(row_S.shape)}")
    for buffer, part in zip(statistics, row_S.split(lengths), strict=True):
        buffer.copy_(part)


def _running_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Return the buffers themselves, by their names in the network's state."""
    return {
        f"{name}.{kind}": buffer
        for name, module in network.named_modules()
        if isinstance(module, GroupBatchNorm)
        for kind, buffer in (("running_mean", module.running_mean), ("running_var", module.running_var))
        if buffer is not None
    }


@torch.no_grad()
def recompute_running_statistics(
    network: nn.Module, backend: Backend, batches: Iterable[Tensor], forward: Callable[[Tensor], object] | None = None
) -> None:
    """Set the running statistics to those of the current weights: plain averages over the groups of some training batches.

    "Precise BN" (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3): each layer normalises by its
    group, as in training, and over all groups `mean = E[mean_g]`, `var = E[mean_g^2 + var_g] - mean^2`. An exponential average
    would include statistics of older weights, from few groups. Dropout is off. Frozen layers keep their statistics.

    `batches`: this rank's inputs, the same number on every rank. `forward` runs the network on one (None: `network` itself).
    Every rank ends with the same statistics, which do not depend on the layout of groups over ranks. Raises ValueError when
    there are no batches.
    """
    modes = {module: module.training for module in network.modules()}
    norms = [module for module in modes if isinstance(module, GroupBatchNorm) and module.training]
    if not norms:
        return
    network.eval()
    for norm in norms:
        norm.train()
        norm.population = PopulationMoments(norm.num_features, backend.device)
    try:
        for x in batches:
            (forward or network)(x)
        _share_population(norms, backend)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm in norms:
            norm.population = None


def _share_population(norms: list[GroupBatchNorm], backend: Backend) -> None:
    """Write the moments over all ranks into the running statistics, in one message. (All ranks of a group contribute it.)"""
    populations = [norm.population for norm in norms if norm.population is not None]
    if populations[0].groups == 0:
        raise ValueError("running statistics cannot be recomputed from no batches")
    moments = torch.cat([population.sums_2C / population.groups for population in populations], dim=1)
    backend.all_reduce_(moments, "population_statistics")
    moments /= backend.topology.size
    for norm, (mean_C, second_C) in zip(
        norms, moments.split([norm.num_features for norm in norms], dim=1), strict=True
    ):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean_C)
        norm.running_var.copy_((second_C - mean_C.square()).clamp_(min=0))

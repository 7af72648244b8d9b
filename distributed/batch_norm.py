"""Batch normalisation over groups of clips that lie within a rank, or over ranks, as the recipe says.

The statistics of a group never depend on how the groups are laid out. Running statistics follow the mean over all groups
of a step; each rank keeps the part of its own groups, and `average_running_statistics` joins them: the update is linear, so
averaging now and then gives what averaging at every step would have given. `recompute_running_statistics` replaces them by those
of the present weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .backend import Backend, Group
from .norm_messages import RunningUpdate
from .synchronized_norm import synchronized_norm


@dataclass(frozen=True)
class GroupLayout:
    """How the groups of every layer lie: `ghosts` equal parts of each micro-batch, or `group`, the ranks that share one."""

    backend: Backend
    ghosts: int
    group: Group | None
    accumulation: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copy of a network stays in the same world


class GroupBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm over groups of clips, made from torch's own, whose tensors it takes over.

    Takes any shape (B, C, ...) with B in the order of clips. In evaluation mode, so where it is frozen too, it normalises by its
    running statistics and sends nothing. Unlike torch's it does not count batches: nothing here needs their number.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, name: str, layout: GroupLayout) -> None:
        if norm.momentum is None or norm.running_mean is None:
            raise ValueError(
                f"batch norm {name}: momentum=None and track_running_stats=False have no running averages over groups. "
                "Fix: build it with a momentum and track_running_stats=True; plain averages come from batch.precise_bn_steps"
            )
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = norm.training
        self.name = name
        self.layout = layout
        self.population: PopulationMoments | None = None
        """Where it is set, a forward pass in training mode adds to it and leaves the running statistics alone."""
        self._micro_step = 0

    def _check_input_dim(self, x_BC: Tensor) -> None:
        pass

    def forward(self, x_BC: Tensor) -> Tensor:
        statistics, affine, layout = (self.running_mean, self.running_var), (self.weight, self.bias), self.layout
        if not self.training:
            return functional.batch_norm(x_BC, *statistics, *affine, False, 0.0, self.eps)
        if layout.group is not None:
            population = self.population
            running = self._running_update(*statistics) if population is None else None
            out_BC, mean_C, var_C, count = synchronized_norm(x_BC, *affine, self.eps, self._sum_over_group, running)
            if population is not None:
                population.add(mean_C[None], var_C[None], count)
            return out_BC
        if layout.ghosts == layout.accumulation == 1 and self.population is None:
            assert self.momentum is not None
            return functional.batch_norm(x_BC, *statistics, *affine, True, self.momentum, self.eps)
        return self._over_ghosts(x_BC)

    def _sum_over_group(self, x: Tensor, kind: str) -> None:
        self.layout.backend.all_reduce_(x, f"{self.name}.{kind}", self.layout.group)

    def _over_ghosts(self, x_BC: Tensor) -> Tensor:
        ghosts = self.layout.ghosts
        if len(x_BC) % ghosts:
            raise ValueError(f"{self.name}: {len(x_BC)} frames do not divide into {ghosts} batch-norm groups")
        # With momentum 1 torch's own kernel leaves the group's mean and unbiased variance in these.
        assert self.running_mean is not None
        mean_GC, var_GC = self.running_mean.new_zeros(2, ghosts, self.num_features)
        parts = x_BC.chunk(ghosts)
        outs = [
            functional.batch_norm(part_BC, mean_C, var_C, self.weight, self.bias, True, 1.0, self.eps)
            for part_BC, mean_C, var_C in zip(parts, mean_GC, var_GC, strict=True)
        ]
        if self.population is not None:
            self.population.add(mean_GC, var_GC, parts[0].numel() // self.num_features)
        else:
            update = self._running_update(self.running_mean, self.running_var)
            update.apply_(*((mean_GC.mean(0), var_GC.mean(0)) if ghosts > 1 else (mean_GC[0], var_GC[0])))
        return torch.cat(outs) if ghosts > 1 else outs[0]

    def _running_update(self, mean_C: Tensor | None, var_C: Tensor | None) -> RunningUpdate:
        """Return this micro-step's update of the running statistics.

        The micro-steps of a training step add up to one exponential step, towards the mean of their statistics.
        """
        assert mean_C is not None and var_C is not None and self.momentum is not None
        accumulation = self.layout.accumulation
        decay = 1 - self.momentum if self._micro_step == 0 else 1.0
        self._micro_step = (self._micro_step + 1) % accumulation
        return RunningUpdate(mean_C, var_C, decay, self.momentum / accumulation)


def convert_batch_norm(
    network: nn.Module, backend: Backend, ghosts: int, rank_groups: list[list[int]], accumulation: int
) -> None:
    """Replace every batch norm below a network, in place, by one over groups.

    The tensors stay the same objects under the same names, so an optimizer or a shared module keeps its hold on them; modes and
    what is frozen stay too. `rank_groups`: ranks that share a group, all ranks call with the same list; empty where groups lie
    within ranks, `ghosts` in each micro-batch. Raises ValueError for a batch norm without running averages.
    """
    if isinstance(network, nn.modules.batchnorm._BatchNorm):
        raise ValueError("convert_batch_norm replaces the norms inside a network. Fix: hand it nn.Sequential(norm)")
    layout = GroupLayout(backend, ghosts, backend.group(rank_groups) if rank_groups else None, accumulation)
    made: dict[nn.Module, GroupBatchNorm] = {}  # a norm that stands in two places stays one
    for parent_name, parent in list(network.named_modules()):
        for child_name, child in parent._modules.items():
            if not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            if child not in made:
                made[child] = GroupBatchNorm(child, f"{parent_name}.{child_name}".lstrip("."), layout)
            setattr(parent, child_name, made[child])


@torch.no_grad()
def average_running_statistics(network: nn.Module, backend: Backend) -> None:
    """Give every rank the mean over ranks of the running statistics, in one message. Call it before evaluation."""
    live = _running_statistics(network)
    for name, mean_C in averaged_running_statistics(network, backend).items():
        live[name].copy_(mean_C)


@torch.no_grad()
def averaged_running_statistics(network: nn.Module, backend: Backend) -> dict[str, Tensor]:
    """The mean over ranks of the running statistics, by the names of the network's state, in one message.

    Nothing changes; empty where there is one rank, or no batch norm over groups.
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
    """A copy of this rank's running statistics: the numbers of all layers in a row."""
    statistics = list(_running_statistics(network).values())
    parameter = next(network.parameters())
    return torch.cat([parameter.new_empty(0), *statistics])


@torch.no_grad()
def running_statistics_by_rank(network: nn.Module, backend: Backend) -> Tensor:
    """Every rank's own running statistics, on every rank: shape (ranks, numbers of all layers)."""
    row_S = own_running_statistics(network)
    rows_RS = row_S.new_zeros(backend.topology.size, len(row_S))
    if len(row_S):
        rows_RS[backend.topology.rank] = row_S
        backend.all_reduce_(rows_RS, "running_statistics_by_rank")  # others add zeros: exact
    return rows_RS


@torch.no_grad()
def set_running_statistics(network: nn.Module, row_S: Tensor) -> None:
    """Take a row of `own_running_statistics` as this rank's own. Raises ValueError for another network's."""
    statistics = list(_running_statistics(network).values())
    lengths = [len(buffer) for buffer in statistics]
    if row_S.shape != (sum(lengths),):
        raise ValueError(f"running statistics of {sum(lengths)} numbers cannot be set from {tuple(row_S.shape)}")
    for buffer, part in zip(statistics, row_S.split(lengths), strict=True):
        buffer.copy_(part)


def _running_statistics(network: nn.Module) -> dict[str, Tensor]:
    """The live tensors, by their names in the network's state."""
    return {
        f"{name}.{kind}": buffer
        for name, module in network.named_modules()
        if isinstance(module, GroupBatchNorm)
        for kind, buffer in (("running_mean", module.running_mean), ("running_var", module.running_var))
        if buffer is not None
    }


class PopulationMoments:
    """Sums over groups of their means and of their second moments about 0, in float64."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.sums_2C = torch.zeros(2, channels, dtype=torch.float64, device=device)
        self.groups = 0

    def add(self, mean_GC: Tensor, unbiased_var_GC: Tensor, count: int | Tensor) -> None:
        mean_GC = mean_GC.double()
        self.sums_2C[0] += mean_GC.sum(0)
        self.sums_2C[1] += (unbiased_var_GC.double() * ((count - 1) / count) + mean_GC.square()).sum(0)
        self.groups += len(mean_GC)


@torch.no_grad()
def recompute_running_statistics(network: nn.Module, backend: Backend, batches: Iterable[Tensor]) -> None:
    """Set the running statistics to those of the present weights: plain averages over the groups of some training batches.

    "Precise BN" (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3): each layer normalises by its
    group, as in training, and over all groups `mean = E[mean_g]`, `var = E[mean_g^2 + var_g] - mean^2`. An exponential average
    instead mixes statistics of older weights, and of few groups. Dropout is off. Frozen layers keep their statistics.

    `batches`: this rank's inputs, as many on every rank. Every rank ends with the same statistics, which do not depend on how
    the groups lay on ranks. Raises ValueError when there are no batches.
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
            network(x)
        _share_population(norms, backend)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm in norms:
            norm.population = None


def _share_population(norms: list[GroupBatchNorm], backend: Backend) -> None:
    """Write the moments over all ranks into the running statistics: one message. (Ranks of a group all bring its part.)"""
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

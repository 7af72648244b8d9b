"""Batch normalisation over groups of clips that lie within a rank, or over ranks, as the recipe says.

The statistics of a group never depend on how the groups are laid out. Running statistics follow the mean over all groups
of a step; each rank keeps the part of its own groups, and `average_running_statistics` joins them: the update is linear, so
averaging now and then gives what averaging at every step would have given. `recompute_running_statistics` replaces them by those
of the present weights.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from distributed.backends.base import Backend, Group

from .messages import RunningUpdate
from .synchronized import synchronized_norm


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

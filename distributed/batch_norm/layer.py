"""Batch norm over groups of clips within a rank, or over several ranks, as the recipe says.

The statistics of a group do not depend on the layout of groups over ranks. Running statistics follow the mean over all groups
of a step. Each rank updates its own with its own groups, and `average_running_statistics` averages them over ranks: the update
is linear, so averaging before an evaluation equals averaging at every step. `recompute_running_statistics` replaces them by
statistics of the current weights.
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
    """The layout of batch-norm groups: `ghosts` equal parts of each micro-batch, or `group`, the ranks that share a group."""

    backend: Backend
    ghosts: int
    group: Group | None
    accumulation: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A copy of a network is in the same world.
        return self


class GroupBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm over groups of clips, made from a batch norm of torch, whose tensors it takes over.

    Takes any shape (B, C, ...) with B in the order of clips. In evaluation mode, and so where it is frozen, it normalises by its
    running statistics and sends nothing. Unlike torch's, it does not update `num_batches_tracked`.
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
        """If set, a forward pass in training mode adds to it and does not update the running statistics."""
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

        The micro-steps of a training step add up to one exponential update with the mean of their statistics.
        """
        assert mean_C is not None and var_C is not None and self.momentum is not None
        accumulation = self.layout.accumulation
        decay = 1 - self.momentum if self._micro_step == 0 else 1.0
        self._micro_step = (self._micro_step + 1) % accumulation
        return RunningUpdate(mean_C, var_C, decay, self.momentum / accumulation)


def convert_batch_norm(
    network: nn.Module, backend: Backend, ghosts: int, rank_groups: list[list[int]], accumulation: int
) -> None:
    """Replace every batch norm inside a network, in place, by a GroupBatchNorm.

    The tensors stay the same objects under the same names, so optimizers and shared modules keep their references; training
    modes and frozen layers stay as they are. `rank_groups`: ranks that share a group, the same list on all ranks; empty where
    groups are within ranks, `ghosts` in each micro-batch. Raises ValueError for a batch norm without running averages.
    """
    if isinstance(network, nn.modules.batchnorm._BatchNorm):
        raise ValueError("convert_batch_norm replaces the norms inside a network. Fix: pass nn.Sequential(norm)")
    layout = GroupLayout(backend, ghosts, backend.group(rank_groups) if rank_groups else None, accumulation)
    # A norm that is used in two places stays one module.
    made: dict[nn.Module, GroupBatchNorm] = {}
    for parent_name, parent in list(network.named_modules()):
        for child_name, child in parent._modules.items():
            if not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            if child not in made:
                made[child] = GroupBatchNorm(child, f"{parent_name}.{child_name}".lstrip("."), layout)
            setattr(parent, child_name, made[child])


class PopulationMoments:
    """Sums of the means and of the second moments about 0 over groups, in float64."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.sums_2C = torch.zeros(2, channels, dtype=torch.float64, device=device)
        self.groups = 0

    def add(self, mean_GC: Tensor, unbiased_var_GC: Tensor, count: int | Tensor) -> None:
        mean_GC = mean_GC.double()
        self.sums_2C[0] += mean_GC.sum(0)
        self.sums_2C[1] += (unbiased_var_GC.double() * ((count - 1) / count) + mean_GC.square()).sum(0)
        self.groups += len(mean_GC)

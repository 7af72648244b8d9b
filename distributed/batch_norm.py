"""Batch normalisation over groups of clips that lie within a rank, or over ranks, as the recipe says.

The statistics of a group never depend on how the groups are laid out. Running statistics follow the mean over all groups
of a step; each rank keeps the part of its own groups, and `average_running_statistics` joins them: the update is linear, so
averaging now and then gives what averaging at every step would have given.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .backend import Backend, Group


class GroupBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm over groups of clips; takes any shape (B, C, ...) with B in the order of clips.

    `ghosts` equal parts of the local batch are groups of their own, or, with `group`, the local batches of its ranks are one.
    """

    def __init__(self, num_features: int, eps: float, momentum: float, name: str) -> None:
        super().__init__(num_features, eps, momentum)
        self.name = name
        self._momentum = momentum
        self.ghosts = 1
        self.group: Group | None = None
        self.backend: Backend | None = None
        self.accumulation = 1
        self._micro_step = 0

    def _check_input_dim(self, x_BC: Tensor) -> None:
        pass

    def forward(self, x_BC: Tensor) -> Tensor:
        if not self.training:
            return functional.batch_norm(
                x_BC, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if self.group is None:
            if self.ghosts == 1 and self.accumulation == 1:  # what torch's own batch norm does, in its one kernel
                statistics = self.running_mean, self.running_var
                return functional.batch_norm(x_BC, *statistics, self.weight, self.bias, True, self._momentum, self.eps)
            return self._over_ghosts(x_BC)
        assert self.backend is not None
        out_BC, mean_C, unbiased_var_C = _SynchronizedNorm.apply(x_BC, self.weight, self.bias, self)
        self._update_running_statistics(mean_C, unbiased_var_C)
        return out_BC

    def _over_ghosts(self, x_BC: Tensor) -> Tensor:
        if len(x_BC) % self.ghosts:
            raise ValueError(f"{self.name}: {len(x_BC)} frames do not divide into {self.ghosts} batch-norm groups")
        outs, means, variances = [], [], []
        for part_BC in x_BC.split(len(x_BC) // self.ghosts):
            # With momentum 1 torch's own kernel leaves the group's mean and unbiased variance in these.
            mean_C, var_C = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)  # type: ignore[arg-type]
            outs.append(functional.batch_norm(part_BC, mean_C, var_C, self.weight, self.bias, True, 1.0, self.eps))
            means.append(mean_C)
            variances.append(var_C)
        if self.ghosts == 1:
            self._update_running_statistics(means[0], variances[0])
            return outs[0]
        self._update_running_statistics(torch.stack(means).mean(0), torch.stack(variances).mean(0))
        return torch.cat(outs)

    @torch.no_grad()
    def _update_running_statistics(self, mean_C: Tensor, var_C: Tensor) -> None:
        """One exponential step per training step, towards the mean of its micro-steps' statistics."""
        assert self.running_mean is not None and self.running_var is not None
        if self._micro_step == 0:
            self.running_mean.mul_(1 - self._momentum)
            self.running_var.mul_(1 - self._momentum)
        self.running_mean.add_(mean_C, alpha=self._momentum / self.accumulation)
        self.running_var.add_(var_C, alpha=self._momentum / self.accumulation)
        self._micro_step = (self._micro_step + 1) % self.accumulation


class _SynchronizedNorm(torch.autograd.Function):
    """Normalises a rank's part of a group by the statistics of the whole group: one all-reduce each way.

    Returns `(out_BC, mean_C, unbiased_var_C)`. Statistics travel in float32 at least.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BC: Tensor, weight_C: Tensor, bias_C: Tensor, norm: GroupBatchNorm
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert norm.backend is not None and norm.group is not None and norm.running_mean is not None
        dims = [dim for dim in range(x_BC.dim()) if dim != 1]
        # Deviations from a point that all ranks of the group share lose no digits when they are summed up.
        shared_C = norm.running_mean.detach()
        var_C, mean_C = torch.var_mean(x_BC.to(shared_C.dtype), dims, correction=0)
        count = x_BC.numel() // x_BC.shape[1]
        deviation_C = mean_C - shared_C
        sums = torch.cat([deviation_C * count, (var_C + deviation_C.square()) * count, deviation_C.new_tensor([count])])
        norm.backend.all_reduce_(sums, f"{norm.name}.statistics", norm.group)
        total = sums[-1]
        deviation_C, square_C = (sums[:-1] / total).chunk(2)
        mean_C = shared_C + deviation_C
        var_C = square_C - deviation_C.square()
        out_BC = functional.batch_norm(x_BC, mean_C, var_C, weight_C, bias_C, False, 0.0, norm.eps)
        ctx.save_for_backward(x_BC, weight_C, mean_C, var_C, total)
        ctx.norm = norm
        unbiased_var_C = var_C * (total / (total - 1))
        ctx.mark_non_differentiable(mean_C, unbiased_var_C)
        return out_BC, mean_C, unbiased_var_C

    @staticmethod
    def backward(ctx: Any, grad_BC: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x_BC, weight_C, mean_C, var_C, total = ctx.saved_tensors
        norm: GroupBatchNorm = ctx.norm
        assert norm.backend is not None
        # As for fixed statistics: the local sums over xhat * grad and grad, and grad * weight / std.
        grad_x_BC, grad_weight_C, grad_bias_C = torch.ops.aten.native_batch_norm_backward(
            grad_BC, x_BC, weight_C, mean_C, var_C, None, None, False, norm.eps, [True, True, True]
        )
        sums = torch.cat([grad_weight_C, grad_bias_C])
        norm.backend.all_reduce_(sums, f"{norm.name}.gradients", norm.group)
        mean_xhat_grad_C, mean_grad_C = (sums / total).chunk(2)
        # What the statistics themselves add: -weight / std * (mean(grad) + xhat * mean(xhat * grad)), linear in x.
        inverse_std_C = (var_C + norm.eps).rsqrt()
        slope_C = weight_C * inverse_std_C.square() * mean_xhat_grad_C
        constant_C = weight_C * inverse_std_C * mean_grad_C - slope_C * mean_C
        shape = [-1 if dim == 1 else 1 for dim in range(x_BC.dim())]
        slope_C, constant_C = slope_C.to(x_BC.dtype).view(shape), constant_C.to(x_BC.dtype).view(shape)
        grad_x_BC = grad_x_BC.sub_(constant_C).addcmul_(x_BC, slope_C, value=-1)
        return grad_x_BC, grad_weight_C, grad_bias_C, None


def convert_batch_norm(
    network: nn.Module, backend: Backend, ghosts: int, rank_groups: list[list[int]], accumulation: int
) -> None:
    """Replace every batch norm of a network, in place, by one over groups; names and values of tensors stay.

    `rank_groups`: ranks that share a group; empty where groups lie within ranks, `ghosts` in each micro-batch.
    """
    group = backend.group(rank_groups) if rank_groups else None
    for parent_name, parent in list(network.named_modules()):
        for child_name, child in list(parent.named_children()):
            if not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            name = f"{parent_name}.{child_name}".lstrip(".")
            assert child.momentum is not None
            norm = GroupBatchNorm(child.num_features, child.eps, child.momentum, name)
            norm.load_state_dict(child.state_dict())
            norm.to(child.weight)
            norm.ghosts, norm.group, norm.backend, norm.accumulation = ghosts, group, backend, accumulation
            setattr(parent, child_name, norm)


@torch.no_grad()
def average_running_statistics(network: nn.Module, backend: Backend) -> None:
    """Give every rank the mean over ranks of the running statistics, in one message. Call it before evaluation and saving."""
    if backend.topology.size == 1:
        return
    buffers = [
        buffer
        for module in network.modules()
        if isinstance(module, GroupBatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    flat = torch.cat(buffers)
    backend.all_reduce_(flat, "running_statistics")
    flat /= backend.topology.size
    for buffer, part in zip(buffers, flat.split([len(buffer) for buffer in buffers]), strict=True):
        buffer.copy_(part)

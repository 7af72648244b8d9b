"""Steps that change nothing where the gradient is not finite: decided on the device, the same on every rank.

All ranks hold the same reduced gradient, so they decide alike without asking each other. NCCL and Gloo finish each part of a
sum in one place and hand it round; MPI's pairwise exchanges add the same pairs on both sides; what fp16 cannot hold turns into
an infinity in front of the sum or within it, and no sum turns an infinity or a NaN back into a number.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .optimizers import DeviceStepCount


class NonFiniteGuard:
    """Around one step: `begin`, each forward pass, `checked` on the last one's loss, the reduction, then `update`.

    Running statistics are each rank's own, and a variance can overflow where the gradient does not. So a rank whose
    statistics or loss are not finite makes its gradient NaN, and hears of it from the reduced gradient like all others.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # In a TemporalNetwork these are the batch norms' running statistics.
        self._statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the running statistics in front of the step's first forward pass."""
        self._before = self._flat_statistics()

    def checked(self, loss: Tensor) -> Tensor:
        """The last micro-step's loss, or NaN where this rank's forward passes left anything that is not finite."""
        with torch.no_grad():
            self._after = self._flat_statistics()
            # 0 times the sum is 0, or NaN where the sum is not finite
            factor = 1 + 0 * (self._after.sum() + loss)
        return loss * factor.to(loss.dtype)

    @torch.no_grad()
    def update(self, gradient_norm: Tensor) -> Tensor:
        """Take the optimizer's step, or take back the running statistics where the norm of the gradient is not finite.

        Returns 1.0 where the step was bad, else 0.0: float32, on the device.
        """
        bad = (~gradient_norm.isfinite()).float()
        if getattr(self._optimizer, "_step_supports_amp_scaling", False):
            self._optimizer.found_inf, self._optimizer.grad_scale = bad, None  # type: ignore[attr-defined]
            self._optimizer.step()
            del self._optimizer.found_inf, self._optimizer.grad_scale  # type: ignore[attr-defined]
        else:
            self._step_and_take_back(bad.bool())
        self._restore_statistics(bad.bool())
        return bad

    def _step_and_take_back(self, bad: Tensor) -> None:
        """For optimizers that cannot skip a step on the device (timm's LAMB): at the cost of a copy of all they change."""
        live = list(_tensors_of(self._optimizer))
        before = [tensor.detach().clone() for tensor in live]
        self._optimizer.step()
        for tensor, saved in zip(live, before, strict=True):
            tensor.copy_(torch.where(bad, saved, tensor))

    def _flat_statistics(self) -> Tensor:
        if not self._statistics:
            return torch.zeros(())
        return torch.cat([buffer.reshape(-1) for buffer in self._statistics])

    def _restore_statistics(self, bad: Tensor) -> None:
        if not self._statistics:
            return
        right = torch.where(bad, self._before, self._after)
        parts = right.split([buffer.numel() for buffer in self._statistics])
        torch._foreach_copy_(
            self._statistics, [part.view_as(buffer) for part, buffer in zip(parts, self._statistics, strict=True)]
        )


def _tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Parameters, their state, and what the groups count in tensors."""
    for group in optimizer.param_groups:
        values = (value.count if isinstance(value, DeviceStepCount) else value for value in group.values())
        yield from (value for value in values if isinstance(value, Tensor))
        for parameter in group["params"]:
            yield parameter
            yield from (value for value in optimizer.state[parameter].values() if isinstance(value, Tensor))


def gradient_norms(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], Tensor]:
    """All gradients of an optimizer, and the 2-norm of each, shape (P,). On the device; reads each gradient once."""
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    return gradients, torch.stack(torch._foreach_norm(gradients))


def clip_(gradients: list[Tensor], gradient_norm: Tensor, limit: float) -> None:
    """Scale gradients, in place, so that their common norm is `limit` at the most; torch's own rule and margin."""
    torch._foreach_mul_(gradients, (limit / (gradient_norm + 1e-6)).clamp(max=1.0))

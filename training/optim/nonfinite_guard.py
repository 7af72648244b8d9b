"""Skip steps with non-finite gradients: decided on the device, the same way on every rank.

All ranks hold the same reduced gradient, so they decide the same without communication. NCCL and Gloo finish each part of a
sum on one rank and send it to the others; MPI's pairwise exchanges add the same pairs on both sides. A value that overflows
fp16 becomes an infinity before the sum or in it, and no sum turns an infinity or a NaN back into a number.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .optimizers import DeviceStepCount


class NonFiniteGuard:
    """Guards one step at a time: `begin`, each forward pass, `checked` on the last loss, the reduction, then `update`.

    Running statistics are each rank's own, and a variance can overflow although the gradient does not. So a rank with
    non-finite statistics or loss makes its gradient NaN, and all ranks see that in the reduced gradient.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # In a TemporalNetwork these are BN's running statistics.
        self._statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]

    @torch.no_grad()
    def begin(self) -> None:
        """Save the running statistics before the step's first forward pass."""
        self._before = self._flat_statistics()

    def checked(self, loss: Tensor) -> Tensor:
        """Return the last micro-step's loss, or NaN if this rank's running statistics or the loss are not finite."""
        with torch.no_grad():
            self._after = self._flat_statistics()
            # 0 times the sum is 0, or NaN if the sum is not finite.
            factor = 1 + 0 * (self._after.sum() + loss)
        return loss * factor.to(loss.dtype)

    @torch.no_grad()
    def update(self, gradient_norm: Tensor) -> Tensor:
        """Take the optimizer's step, or skip it and restore the running statistics if the gradient's norm is not finite.

        Returns 1.0 if the step was skipped, else 0.0: float32, on the device.
        """
        skipped = (~gradient_norm.isfinite()).float()
        if getattr(self._optimizer, "_step_supports_amp_scaling", False):
            self._optimizer.found_inf, self._optimizer.grad_scale = skipped, None  # type: ignore[attr-defined]
            self._optimizer.step()
            del self._optimizer.found_inf, self._optimizer.grad_scale  # type: ignore[attr-defined]
        else:
            self._step_and_undo(skipped.bool())
        self._restore_statistics(skipped.bool())
        return skipped

    def _step_and_undo(self, skipped: Tensor) -> None:
        """Step, then undo it if skipped: for optimizers that cannot skip on the device (timm's LAMB). Copies all state."""
        live = list(_tensors_of(self._optimizer))
        before = [tensor.detach().clone() for tensor in live]
        self._optimizer.step()
        for tensor, saved in zip(live, before, strict=True):
            tensor.copy_(torch.where(skipped, saved, tensor))

    def _flat_statistics(self) -> Tensor:
        if not self._statistics:
            return torch.zeros(())
        return torch.cat([buffer.reshape(-1) for buffer in self._statistics])

    def _restore_statistics(self, skipped: Tensor) -> None:
        if not self._statistics:
            return
        statistics = torch.where(skipped, self._before, self._after)
        parts = statistics.split([buffer.numel() for buffer in self._statistics])
        torch._foreach_copy_(
            self._statistics, [part.view_as(buffer) for part, buffer in zip(parts, self._statistics, strict=True)]
        )


def _tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield parameters, their state, and the groups' counters that are tensors."""
    for group in optimizer.param_groups:
        values = (value.count if isinstance(value, DeviceStepCount) else value for value in group.values())
        yield from (value for value in values if isinstance(value, Tensor))
        for parameter in group["params"]:
            yield parameter
            yield from (value for value in optimizer.state[parameter].values() if isinstance(value, Tensor))


def gradient_norms(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], Tensor]:
    """Return all gradients of an optimizer, and the 2-norm of each, shape (P,), on the device. Reads each gradient once."""
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    return gradients, torch.stack(torch._foreach_norm(gradients))


def clip_(gradients: list[Tensor], gradient_norm: Tensor, limit: float) -> None:
    """Clip gradients by their global norm, in place, with torch's rule and margin."""
    torch._foreach_mul_(gradients, (limit / (gradient_norm + 1e-6)).clamp(max=1.0))

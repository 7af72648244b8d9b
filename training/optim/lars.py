"""LARS: SGD with a rate scaled per tensor (You et al., "Large Batch Training of Convolutional Networks", arXiv:1708.03888).

Shapes: P tensors of a group, R rows of CHUNK numbers that hold them.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

CHUNK = 1024
"""Numbers in a row: few compared with a layer, many compared with what a GPU block works on."""

Norm = TypeVar("Norm", float, Tensor)


def trust_ratio(
    weight_norm: Norm, gradient_norm: Norm, weight_decay: float, trust_coefficient: float, eps: float
) -> Norm:
    """Compute the factor on the rate of one or many tensors: `eta |w| / (|g| + wd |w| + eps)`, or 1 if either norm is 0.

    Source: arXiv:1708.03888, equation 6 and algorithm 1. A tensor of zeros has no scale, and one without gradient needs none.
    """
    if isinstance(weight_norm, Tensor):
        ratio = trust_coefficient * weight_norm / (gradient_norm + weight_decay * weight_norm + eps)
        return torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)
    if not (weight_norm > 0 and gradient_norm > 0):
        return 1.0
    return trust_coefficient * weight_norm / (gradient_norm + weight_decay * weight_norm + eps)


class Lars(torch.optim.Optimizer):
    """LARS optimizer: `v <- m v + lr * trust * (g + wd w)`, `w <- w - v`. The velocity contains the rate, as in MLPerf's reference.

    Groups have `lr`, `momentum`, `weight_decay`, and `adapt`: False for tensors with the plain rate (BN and biases, by custom
    without weight decay). State: `momentum_buffer` for each parameter.

    On CPUs torch's fused SGD kernel updates each tensor. On GPUs the tensors of a group lie in one buffer, so that the number
    of kernels does not grow with the number of tensors and no norm is copied to the host; `flat=True` does the same on any
    device. The optimizer then owns the parameters' memory: construct it after everything that moves them.

    Like torch's fused optimizers it skips a step if its attribute `found_inf`, a float32 number on the device, is 1.
    """

    # torch's flag for optimizers that handle `found_inf`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        adapt: bool = True,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        flat: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "adapt": adapt})
        for group in self.param_groups:
            if not (0 <= group["momentum"] < 1 and group["weight_decay"] >= 0):
                raise ValueError(
                    f"momentum must be in [0, 1) and weight_decay 0 or more, got {group['momentum']}, {group['weight_decay']}"
                )
        if not (trust_coefficient > 0 and eps >= 0):
            raise ValueError(f"trust_coefficient must be more than 0 and eps 0 or more, got {trust_coefficient}, {eps}")
        self._trust_coefficient = trust_coefficient
        self._eps = eps
        on_cpu = all(parameter.device.type == "cpu" for group in self.param_groups for parameter in group["params"])
        self._flat_groups = None
        if flat if flat is not None else not on_cpu:
            self._flat_groups = [_FlatGroup(group["params"]) for group in self.param_groups]
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                flat_group = self._flat_groups[number] if self._flat_groups else None
                velocity = flat_group.velocities[place] if flat_group else torch.zeros_like(parameter)
                self.state[parameter]["momentum_buffer"] = velocity

    @property
    def flat(self) -> bool:
        """True if the tensors of each group lie in one buffer."""
        return self._flat_groups is not None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters, each of which must have a gradient."""
        if closure is not None:
            raise ValueError("Lars takes no closure: compute the loss before the step")
        if getattr(self, "grad_scale", None) is not None:
            raise ValueError("Lars takes unscaled gradients: call the scaler's unscale_ before the step")
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if self._flat_groups is None:
            for group in self.param_groups:
                self._step_each(group, found_inf)
        else:
            for group, flat_group in zip(self.param_groups, self._flat_groups, strict=True):
                self._step_flat(group, flat_group, found_inf)

    def trust_ratios(self) -> dict[Tensor, Tensor]:
        """Return the trust ratio of each adapted parameter for its current gradient: 0-dimensional, on its device."""
        ratios: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            if group["adapt"]:
                ratios |= zip(group["params"], self._ratio_of_each(group).unbind(), strict=True)
        return ratios

    def _ratio(self, group: dict[str, Any], weight_norm: Norm, gradient_norm: Norm) -> Norm:
        return trust_ratio(weight_norm, gradient_norm, group["weight_decay"], self._trust_coefficient, self._eps)

    def _ratio_of_each(self, group: dict[str, Any]) -> Tensor:
        weights = [parameter.detach() for parameter in group["params"]]
        gradients = [parameter.grad for parameter in group["params"]]
        norm_of_each = torch._foreach_norm if weights[0].is_cuda else _norm_of_each
        return self._ratio(group, torch.stack(norm_of_each(weights)), torch.stack(norm_of_each(gradients)))

    def _step_each(self, group: dict[str, Any], found_inf: Tensor | None) -> None:
        if not group["adapt"]:
            self._update(group, group["params"], group["lr"], found_inf)
            return
        # Norms and update of one tensor after the other: the update finds weight and gradient in the cache.
        for parameter in group["params"]:
            weight_norm, gradient_norm = (norm.item() for norm in _norm_of_each([parameter, parameter.grad]))
            self._update(group, [parameter], group["lr"] * self._ratio(group, weight_norm, gradient_norm), found_inf)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], rate: float, found_inf: Tensor | None) -> None:
        # The kernel's rule is v <- momentum v + (1 - dampening) (g + weight_decay w), w <- w - lr v. It takes dampening as a
        # double, so that small rates keep their digits.
        torch._fused_sgd_(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [self.state[parameter]["momentum_buffer"] for parameter in parameters],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=1.0,
            dampening=1.0 - rate,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=found_inf,
        )

    def _step_flat(self, group: dict[str, Any], flat: "_FlatGroup", found_inf: Tensor | None) -> None:
        skipped = flat.weight_RC.new_zeros(()) if found_inf is None else found_inf.to(flat.weight_RC)
        torch._foreach_copy_(flat.gradients, [parameter.grad for parameter in group["params"]])
        if group["adapt"]:
            ratio_P = self._ratio(group, flat.norms(flat.weight_RC), flat.norms(flat.gradient_RC))
            rate_R1 = (group["lr"] * ratio_P)[flat.owner_R, None]
        flat.gradient_RC.add_(flat.weight_RC, alpha=group["weight_decay"])
        # A skipped step is v <- 1 v + 0, w <- w - 0 v. Zeros are filled in, because 0 * inf and 0 * nan are nan.
        if found_inf is not None:
            flat.gradient_RC.masked_fill_(skipped.bool(), 0.0)
            if group["adapt"]:
                rate_R1 = rate_R1.masked_fill(skipped.bool(), 0.0)
        flat.velocity_RC.mul_((1 - skipped) * group["momentum"] + skipped)
        if group["adapt"]:
            flat.velocity_RC.addcmul_(flat.gradient_RC, rate_R1)
        else:
            flat.velocity_RC.add_(flat.gradient_RC, alpha=group["lr"])
        flat.weight_RC.addcmul_(flat.velocity_RC, 1 - skipped, value=-1)


class _FlatGroup:
    """Holds the tensors of a group in one buffer. Each tensor starts at a new row; the rest of its last row stays 0."""

    def __init__(self, parameters: list[Tensor]) -> None:
        rows = [-(-parameter.numel() // CHUNK) for parameter in parameters]
        device = parameters[0].device
        self.rows_P = torch.tensor(rows, device=device)
        self.owner_R = torch.repeat_interleave(
            torch.arange(len(rows), device=device), self.rows_P, output_size=sum(rows)
        )
        buffer_KRC = torch.zeros(3, sum(rows), CHUNK, dtype=parameters[0].dtype, device=device)
        self.weight_RC, self.gradient_RC, self.velocity_RC = buffer_KRC
        weights, self.gradients, self.velocities = (_views(flat_RC, parameters, rows) for flat_RC in buffer_KRC)
        for parameter, weight in zip(parameters, weights, strict=True):
            weight.copy_(parameter.detach())
            parameter.data = weight

    def norms(self, flat_RC: Tensor) -> Tensor:
        """Compute the 2-norm of each tensor. Deterministic: no sum depends on the order in which threads finish."""
        square_R = torch.linalg.vector_norm(flat_RC, dim=1).square()
        # unsafe: otherwise torch checks the lengths on the host, and waits for the device twice.
        return torch.segment_reduce(square_R, "sum", lengths=self.rows_P, unsafe=True).sqrt()


def _norm_of_each(tensors: list[Tensor]) -> list[Tensor]:
    """Compute 2-norms on a CPU by way of row norms: torch spreads rows over threads, in half the time of one large sum."""
    norm = torch.linalg.vector_norm
    return [
        norm(norm(tensor, dim=list(range(1, tensor.dim())))) if tensor.dim() > 1 else norm(tensor) for tensor in tensors
    ]


def _views(flat_RC: Tensor, like: list[Tensor], rows: list[int]) -> list[Tensor]:
    """Return views of a buffer with the shapes and memory layouts of tensors, each at the start of its rows."""
    starts = [sum(rows[:place]) * CHUNK for place in range(len(rows))]
    return [
        flat_RC.as_strided(tensor.shape, tensor.stride(), flat_RC.storage_offset() + start)
        for tensor, start in zip(like, starts, strict=True)
    ]

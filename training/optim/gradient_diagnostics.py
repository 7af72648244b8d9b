"""Measure gradients for the log, on request: norms, LARS' trust ratios, and the gradient noise scale."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distributed.backends.base import Backend
from training.recipe import Execution

from .lars import Lars

_KEPT = 0.9
"""Decay per record of the two averages whose ratio is the noise scale."""


def noise_and_signal(small_square: float, large_square: float, small: int, large: int) -> tuple[float, float]:
    """Estimate (trace of the covariance of one clip's gradient, squared norm of the true gradient).

    Computed from the squared norms of gradients over `small` and `large` clips. Either estimate can be negative for a
    single step. Source: McCandlish et al., "An Empirical Model of Large-Batch Training" (arXiv:1812.06162), appendix A.1.
    """
    noise = (small_square - large_square) / (1 / small - 1 / large)
    signal = (large * large_square - small * small_square) / (large - small)
    return noise, signal


class GradientDiagnostics:
    """Measures the steps that are logged; other steps do not use it.

    The small batch is the first micro-batch of each rank; one all-reduce averages its squared norm over ranks. Clips that
    share BN statistics are not independent, as the theory assumes, so only trend and magnitude of the noise scale mean
    something.
    """

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, backend: Backend, execution: Execution
    ) -> None:
        self._optimizer = optimizer
        self._backend = backend
        self._execution = execution
        names = {parameter: name for name, parameter in network.named_parameters()}
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._names = [names[parameter] for parameter in self._parameters]
        self._averages: tuple[float, ...] | None = None

    @contextmanager
    def first_micro_step(self) -> Iterator[None]:
        """Context around the forward and backward pass that measures each gradient's norm before its reduction."""
        squares: list[Tensor] = []

        def note(parameter: Tensor) -> None:
            assert parameter.grad is not None
            squares.append(torch.linalg.vector_norm(parameter.grad).double().square())

        hooks = [parameter.register_post_accumulate_grad_hook(note) for parameter in self._parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._local_square = torch.stack(squares).sum() * self._execution.accumulation**2

    @torch.no_grad()
    def reduced(self, norm_P: Tensor, loss_scale: Tensor) -> None:
        """Measure before the update what it changes. `norm_P`: norm per parameter, without loss scale and clipping."""
        self._norm_P = norm_P
        self._weight_norm_P = torch.stack(torch._foreach_norm(self._parameters))
        self._ratios = self._optimizer.trust_ratios() if isinstance(self._optimizer, Lars) else {}
        self._local_square = self._local_square / (loss_scale * loss_scale)

    def values(self) -> dict[str, Any]:
        """Return the numbers of the last measured step. Empty if it was skipped. Collective, and waits for the device.

        Norms and ratios are by parameter name. `gradient_noise` and `gradient_signal` are estimates from only this step (see
        `noise_and_signal`). `noise_scale_clips` is the ratio of their averages over the records so far, or None while one of
        those is not positive. All three are absent if the global batch is a single micro-batch.
        """
        square = self._local_square.clone()
        self._backend.all_reduce_(square, "diagnostics")
        small_square = square.item() / self._backend.topology.size
        norms, weight_norms = self._norm_P.tolist(), self._weight_norm_P.tolist()
        large_square = sum(norm * norm for norm in norms)
        # False for NaN too.
        if not (small_square < float("inf") and large_square < float("inf")):
            return {}
        ratios = {parameter: ratio.item() for parameter, ratio in self._ratios.items()}
        return {
            "gradient_norm": large_square**0.5,
            **self._noise(small_square, large_square),
            "gradient_norms": dict(zip(self._names, norms, strict=True)),
            "weight_norms": dict(zip(self._names, weight_norms, strict=True)),
            "trust_ratios": {
                name: ratios[parameter]
                for name, parameter in zip(self._names, self._parameters, strict=True)
                if parameter in ratios
            },
        }

    def _noise(self, small_square: float, large_square: float) -> dict[str, float | None]:
        small, large = self._execution.micro_batch, self._execution.global_batch
        if small == large:
            return {}
        now = noise_and_signal(small_square, large_square, small, large)
        before = self._averages or now
        self._averages = noise, signal = tuple(
            _KEPT * old + (1 - _KEPT) * new for old, new in zip(before, now, strict=True)
        )
        scale = noise / signal if noise > 0 and signal > 0 else None
        return {"gradient_noise": now[0], "gradient_signal": now[1], "noise_scale_clips": scale}

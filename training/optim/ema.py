"""EMA (exponential moving average) of weights, which often evaluates better than the weights themselves."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PREFIX = "average."
"""Start of the names of EMA tensors in checkpoints."""


class EMA:
    """EMA of a network's parameters: `average <- decay * average + (1 - decay) * weight` after every step that is not skipped.

    Source: Polyak and Juditsky, 1992. BN's running statistics are not averaged: they follow the weights of the last steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {decay}")
        self._decay = decay
        self._weights = dict(network.named_parameters())
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Update the average with the current weights, unless `skipped` is 1.0 (else 0.0). Does not wait for the device."""
        average = list(self._average.values())
        difference = torch._foreach_sub(list(self._weights.values()), average)
        torch._foreach_mul_(difference, (1 - skipped).to(average[0].dtype) * (1 - self._decay))
        torch._foreach_add_(average, difference)

    def tensors(self) -> dict[str, Tensor]:
        """Return the live tensors by name, for checkpoints."""
        return {PREFIX + name: tensor for name, tensor in self._average.items()}

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Context in which the network computes with the average. Afterwards the weights are restored, bit for bit."""
        kept = [weight.detach().clone() for weight in self._weights.values()]
        self._copy(self._average.values())
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, tensors: Iterable[Tensor]) -> None:
        torch._foreach_copy_(list(self._weights.values()), list(tensors))

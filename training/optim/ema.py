"""An exponential moving average of weights, which often evaluates better than the weights themselves."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PREFIX = "average."


class EMA:
    """`average <- decay * average + (1 - decay) * weight` after every step that was taken (Polyak and Juditsky, 1992).

    Batch norm's running statistics are the network's own: they follow the weights of the last steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {decay}")
        self._decay = decay
        self._weights = dict(network.named_parameters())
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, bad: Tensor) -> None:
        """Take the present weights in, unless the step was `bad` (1.0, else 0.0; on the device)."""
        average = list(self._average.values())
        difference = torch._foreach_sub(list(self._weights.values()), average)
        torch._foreach_mul_(difference, (1 - bad).to(average[0].dtype) * (1 - self._decay))
        torch._foreach_add_(average, difference)

    def tensors(self) -> dict[str, Tensor]:
        """The average by name, for checkpoints; the tensors are the live ones."""
        return {PREFIX + name: tensor for name, tensor in self._average.items()}

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Within it the network computes with the average; the weights come back, bit for bit."""
        kept = [weight.detach().clone() for weight in self._weights.values()]
        self._copy(self._average.values())
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, tensors: Iterable[Tensor]) -> None:
        torch._foreach_copy_(list(self._weights.values()), list(tensors))

"""Take one training step: from a batch of uint8 clips to updated weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distributed.backends.base import Reducer
from pipelines.loading.clips import ClipBatch
from pipelines.stream.augmentation import dropout_seeds
from pipelines.stream.burn_in import StreamSampling
from training.build.normalise import Normaliser
from training.build.numerics import autocast
from training.optim.ema import EMA
from training.optim.gradient_diagnostics import GradientDiagnostics
from training.optim.nonfinite_guard import NonFiniteGuard, clip_, gradient_norms
from training.optim.optimizers import set_learning_rate
from tsm.networks import TemporalNetwork

from .loss import clip_loss
from .recipe import Execution, Recipe


@dataclass
class Trainer:
    """Takes training steps. `network` is the plain module; forward passes for gradients run through `reducer.network`."""

    recipe: Recipe
    execution: Execution
    rank: int
    network: TemporalNetwork
    optimizer: torch.optim.Optimizer
    reducer: Reducer
    normalise: Normaliser
    scaler: torch.amp.GradScaler
    amp: str
    clip_norm: float | None
    label_smoothing: float
    ema: EMA | None
    stream: StreamSampling | None = None
    """Which frames the loss takes; None: it takes the mean of the logits over all frames (training/loss.py)."""
    guard: NonFiniteGuard = field(init=False)

    def __post_init__(self) -> None:
        self.guard = NonFiniteGuard(self.network, self.optimizer)

    def autocast(self) -> AbstractContextManager[object]:
        return autocast(self.normalise.device, self.amp)

    def step(
        self,
        step: int,
        batches: list[ClipBatch],
        diagnostics: GradientDiagnostics | None = None,
        mark: Callable[[str], None] = lambda phase: None,
    ) -> Tensor:
        """Take step `step` (from 0) on this rank's micro-batches of the global batch.

        `mark` is called as each phase begins (training.telemetry.step_clock). A step with non-finite gradients is skipped
        (training.optim.nonfinite_guard). Returns `[sum of losses, correct predictions, clips, skipped]`: the first three of this
        rank, `skipped` 1 or 0 on all ranks. The tensor is on the device, so that the host does not wait for it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.begin()
        totals = []
        for micro_step, batch in enumerate(batches):
            mark("forward")
            slot_N = self.execution.slots(self.rank, micro_step)
            self.network.dropout.seed_N = self._to_device(
                torch.from_numpy(dropout_seeds(self.recipe.seed, step, slot_N))
            )
            with diagnostics.first_micro_step() if diagnostics and micro_step == 0 else nullcontext():
                totals.append(self._micro_step(batch, micro_step == len(batches) - 1, mark))
        self.reducer.finish()
        mark("optimizer")
        skipped = self._update(self.recipe.schedule.learning_rate(step), diagnostics)
        return torch.cat([torch.stack(totals).sum(0), skipped.double()[None]])

    def _to_device(self, x: Tensor) -> Tensor:
        """Copy a host tensor through pinned memory, because a copy from pageable memory waits for the GPU's queue."""
        device = self.normalise.device
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x

    def _micro_step(self, batch: ClipBatch, last: bool, mark: Callable[[str], None]) -> Tensor:
        """Run forward and backward of one micro-batch. Gradients add up to the mean over all micro-steps."""
        video_NTCHW = self.normalise(batch.video_NTCHW)
        device = video_NTCHW.device
        label_N = batch.label_N.to(device, non_blocking=True)
        burn_in_label_N = batch.burn_in_label_N
        if burn_in_label_N is not None:
            burn_in_label_N = burn_in_label_N.to(device, non_blocking=True)
        with self.reducer.micro_step(last):
            with self.autocast():
                loss, logit_NK = clip_loss(
                    self.reducer.network, video_NTCHW, label_N, burn_in_label_N, self.stream, self.label_smoothing
                )
            if last:
                loss = self.guard.checked(loss)
            with torch.no_grad():
                correct = (logit_NK.argmax(1) == label_N).sum()
                totals = torch.stack(
                    [
                        loss.detach().double() * len(label_N),
                        correct.double(),
                        torch.full_like(correct, len(label_N)).double(),
                    ]
                )
            mark("backward")
            self.scaler.scale(loss / self.execution.accumulation).backward()
        return totals

    def _update(self, learning_rate: float, diagnostics: GradientDiagnostics | None) -> Tensor:
        """Unscale and clip the gradient, take the optimizer's step, and update EMA and loss scale.

        All of this reads the reduced gradient, so every rank does the same. Returns 1.0 if the step was skipped, else 0.0.
        """
        set_learning_rate(self.optimizer, learning_rate)
        self.scaler.unscale_(self.optimizer)
        gradients, norm_P = gradient_norms(self.optimizer)
        norm = torch.linalg.vector_norm(norm_P)
        if self.clip_norm is not None:
            clip_(gradients, norm, self.clip_norm)
        if diagnostics is not None:
            diagnostics.reduced(norm_P, self.scaler.scale(norm.new_ones(())))
        skipped = self.guard.update(norm)
        if self.ema is not None:
            self.ema.update(skipped)
        # Halves the scale if unscale_ found non-finite gradients.
        self.scaler.update()
        return skipped

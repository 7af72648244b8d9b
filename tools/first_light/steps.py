"""The project's Trainer on random clips in memory, in the sizes of this run."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipelines.loading.clips import ClipBatch
from tests.helpers.trainers import batches_of, trainer_of
from training.optim.ema import EMA
from training.step import Trainer

from .settings import Settings, Shape

CLASSES = 400


@dataclass(frozen=True)
class Way:
    """A variant of the training step: precision, memory layout, optimizer, batch norm and network."""

    amp: str = "bfloat16"
    channels_last: bool = True
    tf32: bool = True
    optimizer: str = "sgd"
    ghosts: int = 1
    """Batch-norm groups in a micro-batch."""
    over_ranks: bool = False
    """True: use the batch-norm code for groups of ranks, with world size 1."""
    accumulation: int = 1
    clip_norm: float | None = None
    ema_decay: float | None = None
    dtype: str = "float32"
    network: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of tsm.networks.build_network."""
    shape: dict[str, Any] = field(default_factory=dict)
    """Fields of Shape that differ from the recipe's."""

    def shape_on(self, settings: Settings) -> Shape:
        """Return the way's shape, or the sizes of a tiny run."""
        return settings.shape if settings.tiny else replace(settings.shape, **self.shape)

    @property
    def precision(self) -> str:
        """Name of the matrix product in `facts.ceilings` that bounds this way."""
        if self.amp != "off":
            return self.amp
        return "tf32" if self.tf32 else "float32"


def set_switches(way: Way, benchmark: bool = True) -> None:
    """Set torch's process-wide switches, as training does for the default configuration of `numerics`.

    `benchmark`: cuDNN times its algorithms for each new shape, which took ten seconds per network on the first H200.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = way.tf32
    torch.backends.cudnn.benchmark = benchmark


def build(way: Way, shape: Shape, device: str) -> tuple[Trainer, list[ClipBatch]]:
    """Return a trainer with seeded weights, and the micro-batches of one step, in pinned memory if the device is a GPU."""
    trainer = trainer_of(
        way.optimizer,
        shape.clips,
        clips=shape.clips * way.accumulation,
        device=device,
        amp=way.amp,
        channels_last=way.channels_last,
        bn_group=shape.clips // way.ghosts,
        over_ranks=way.over_ranks,
        backbone=shape.backbone,
        frames=shape.frames,
        network_options=way.network,
        classes=CLASSES,
        dtype=way.dtype,
        clip_norm=way.clip_norm,
    )
    if way.ema_decay is not None:
        trainer.ema = EMA(trainer.network, way.ema_decay)
    batches = batches_of(trainer, 0, size=shape.size)
    return trainer, [batch.pin_memory() if device == "cuda" else batch for batch in batches]


def stepper(way: Way, shape: Shape, device: str, benchmark: bool = True) -> Callable[[], Any]:
    """Return a function that runs one training step, always on the same clips."""
    set_switches(way, benchmark)
    trainer, batches = build(way, shape, device)
    return lambda: trainer.step(0, batches)

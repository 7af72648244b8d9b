"""Recipe (what is trained), Execution (how a world runs it), and the pure function that derives one from the other.

Imports no torch, so that a dry run and preflight can use it anywhere.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .schedule import Schedule

LEFT_OUT_OF_MODEL = {"modality": "rgb"}
"""Settings that `Recipe.model` lacks at these values, as do recipes of older checkpoints, so that their fingerprints stay."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run. World size and accumulation are not part of it.

    `bn_group`: clips whose frames share BN statistics, neighbours in the global batch. `num_rows` and `manifest_digest`
    identify the training clips. `model`, `optimizer` and `augmentation` are resolved settings.
    """

    seed: int
    global_batch: int
    bn_group: int
    total_steps: int
    num_rows: int
    manifest_digest: str
    schedule: Schedule
    model: dict[str, Any]
    optimizer: dict[str, Any]
    augmentation: dict[str, Any]
    numerics: dict[str, Any]

    @property
    def epochs(self) -> float:
        """Number of passes over the training clips."""
        return self.total_steps * self.global_batch / self.num_rows

    @property
    def steps_per_epoch(self) -> float:
        return self.num_rows / self.global_batch

    def epoch_end_step(self, epoch: int) -> int:
        """Return the steps taken when pass `epoch` (from 1) is complete: the first step boundary at or after its last clip."""
        return min(self.total_steps, -(-epoch * self.num_rows // self.global_batch))

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values, for checkpoints and comparisons."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @property
    def fingerprint(self) -> str:
        """Short hash that two runs share only if they have the same recipe."""
        return fingerprint_of(self.as_dict())


def fingerprint_of(recipe: dict[str, Any]) -> str:
    """Compute the fingerprint of a recipe as a checkpoint holds it (`Recipe.as_dict`)."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Execution:
    """Layout of a recipe on a world. It decides only the speed.

    A step's global batch has the slots `[0, global_batch)`. Each of `accumulation` micro-steps holds a contiguous part of
    them, split over ranks in order, so that BN groups are whole within a micro-step. `bn_ghosts` groups lie within each
    rank's micro-batch (1: one group, or a part of one). `bn_ranks` neighbouring ranks share a group.
    """

    world: int
    global_batch: int
    micro_batch: int
    accumulation: int
    bn_ghosts: int
    bn_ranks: int

    def slots(self, rank: int, micro_step: int) -> NDArray[np.int64]:
        """Return the slots of the global batch in a rank's micro-batch. Shape (micro_batch,)."""
        first = (micro_step * self.world + rank) * self.micro_batch
        return np.arange(first, first + self.micro_batch)

    def bn_rank_groups(self) -> list[list[int]]:
        """Return the ranks of each BN group that spans ranks. Empty if groups lie within ranks."""
        if self.bn_ranks == 1:
            return []
        return [list(range(first, first + self.bn_ranks)) for first in range(0, self.world, self.bn_ranks)]

    def stream_positions(self, rank: int, first_step: int, end_step: int) -> Iterator[NDArray[np.int64]]:
        """Yield the stream positions of each micro-batch of a rank, for the steps `[first_step, end_step)`."""
        for step in range(first_step, end_step):
            for micro_step in range(self.accumulation):
                yield step * self.global_batch + self.slots(rank, micro_step)


def make_execution(global_batch: int, bn_group: int, world: int, micro_batch_limit: int | None = None) -> Execution:
    """Lay a global batch and its BN groups out on a world, with the fewest micro-steps.

    `micro_batch_limit`: clips that a process can hold at once (None: any number).

    Raises ConfigError that names the world sizes that fit.
    """
    for name, value in (("batch.global_batch", global_batch), ("batch.bn_group", bn_group)):
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value}. Fix: {name}=NUMBER, 1 or more")
    if global_batch % bn_group:
        lower = max(divisor for divisor in _divisors(global_batch) if divisor <= bn_group or divisor == 1)
        raise ConfigError(
            f"batch.bn_group={bn_group} does not divide batch.global_batch={global_batch}. Fix: batch.bn_group={lower}, or another "
            f"divisor of {global_batch}"
        )
    execution = _lay_out(global_batch, bn_group, world, micro_batch_limit)
    if execution is None:
        limit = (
            ""
            if micro_batch_limit is None
            else f" and at most {micro_batch_limit} clips a micro-batch (batch.micro_batch)"
        )
        fitting = _list_sizes(fitting_worlds(global_batch, bn_group, micro_batch_limit))
        raise ConfigError(
            f"a global batch of {global_batch} clips in batch-norm groups of {bn_group}{limit} does not divide over {world} "
            f"processes. Fix: use {fitting} processes, or change batch.global_batch or batch.bn_group"
        )
    return execution


def micro_batches(global_batch: int, bn_group: int, world: int) -> list[int]:
    """Return all micro-batches of a process with which BN groups stay whole, the largest first."""
    return [execution.micro_batch for execution in _layouts(global_batch, bn_group, world)]


def fitting_worlds(global_batch: int, bn_group: int, micro_batch_limit: int | None = None) -> list[int]:
    """Return all world sizes on which `make_execution` can lay the batch out."""
    return [size for size in _divisors(global_batch) if _lay_out(global_batch, bn_group, size, micro_batch_limit)]


def _lay_out(global_batch: int, bn_group: int, world: int, limit: int | None) -> Execution | None:
    fitting = (each for each in _layouts(global_batch, bn_group, world) if limit is None or each.micro_batch <= limit)
    return next(fitting, None)


def _layouts(global_batch: int, bn_group: int, world: int) -> Iterator[Execution]:
    """Yield all layouts on a world, with a growing number of micro-steps."""
    if global_batch % world:
        return
    per_rank = global_batch // world
    for accumulation in _divisors(per_rank):
        micro_batch = per_rank // accumulation
        if micro_batch % bn_group == 0:
            yield Execution(world, global_batch, micro_batch, accumulation, micro_batch // bn_group, 1)
        elif bn_group % micro_batch == 0 and world % (bn_group // micro_batch) == 0:
            yield Execution(world, global_batch, micro_batch, accumulation, 1, bn_group // micro_batch)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _list_sizes(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:24]))
    return (shown + (", ..." if len(numbers) > 24 else "")) or "no number of"

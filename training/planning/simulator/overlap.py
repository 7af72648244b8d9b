"""Lay gradients into the messages that DDP or Horovod would send, and find what backward does not hide of them.

Shapes: P tensors, in the order in which backward makes their gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .all_reduce import AllReduce

# torch/nn/parallel/distributed.py: bucket_cap_mb, and the first bucket (_DEFAULT_FIRST_BUCKET_BYTES).
DDP_BUCKET_BYTES = 25 * 2**20
DDP_FIRST_BUCKET_BYTES = 2**20
# Horovod's defaults (0.28): HOROVOD_CYCLE_TIME, HOROVOD_FUSION_THRESHOLD.
HOROVOD_CYCLE_S = 1e-3
HOROVOD_FUSION_BYTES = 128 * 2**20
# Backward takes twice as long as forward: a convolution's gradients by its input and by its weights.
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Gradient:
    """A trained tensor: its gradient's bytes in the all-reduce, and the multiply-adds of its layer per clip."""

    num_bytes: int
    multiply_adds: int


@dataclass(frozen=True)
class Message:
    """A fused all-reduce, which may start at `ready_s` after the start of backward."""

    ready_s: float
    num_bytes: int


def ready_times(gradients_P: Sequence[Gradient], backward_s: float) -> list[float]:
    """Return when each gradient is ready, in seconds after the start of backward, whose time follows the multiply-adds."""
    done_P = np.cumsum([gradient.multiply_adds for gradient in gradients_P], dtype=float)
    return [float(done) for done in backward_s * done_P / max(done_P[-1], 1.0)]


def ddp_messages(gradients_P: Sequence[Gradient], ready_P: Sequence[float], fp32_ratio: float = 1.0) -> list[Message]:
    """Fuse as DDP does: a bucket ends with the tensor that reaches its limit, and is reduced when all of it is ready.

    `fp32_ratio`: bytes of the parameters over bytes sent (2 with fp16 compression): DDP's limits count parameters.
    """
    messages: list[Message] = []
    limit, filled = DDP_FIRST_BUCKET_BYTES, 0
    for place, (gradient, ready_s) in enumerate(zip(gradients_P, ready_P, strict=True)):
        filled += gradient.num_bytes
        if filled * fp32_ratio >= limit or place == len(gradients_P) - 1:
            messages.append(Message(ready_s, filled))
            limit, filled = DDP_BUCKET_BYTES, 0
    return messages


def horovod_messages(
    gradients_P: Sequence[Gradient],
    ready_P: Sequence[float],
    cycle_s: float = HOROVOD_CYCLE_S,
    fusion_bytes: int = HOROVOD_FUSION_BYTES,
) -> list[Message]:
    """Fuse as Horovod does: each cycle sends all tensors that have become ready since the last, up to the threshold each."""
    messages: list[Message] = []
    for gradient, ready_s in zip(gradients_P, ready_P, strict=True):
        sent_s = cycle_s * np.ceil(ready_s / cycle_s)
        last = messages[-1] if messages else None
        if last is not None and last.ready_s == sent_s and last.num_bytes + gradient.num_bytes <= fusion_bytes:
            messages[-1] = Message(sent_s, last.num_bytes + gradient.num_bytes)
        else:
            messages.append(Message(float(sent_s), gradient.num_bytes))
    return messages


def exposed_s(
    messages: Sequence[Message], backward_s: float, all_reduce: AllReduce, negotiation_s: float = 0.0
) -> float:
    """Return the seconds from the end of backward to the end of the last message. Messages are sent one after the other."""
    end_s = 0.0
    for message in messages:
        end_s = max(end_s, message.ready_s + negotiation_s) + all_reduce(message.num_bytes)
    return max(0.0, end_s - backward_s)


def hidden_nothing_s(messages: Sequence[Message], all_reduce: AllReduce) -> float:
    """Return the seconds of all messages, if nothing overlaps: the upper bound of `exposed_s`."""
    return sum(all_reduce(message.num_bytes) for message in messages)

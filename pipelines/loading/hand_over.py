"""Hand a batch from a worker to the training process: through shared memory, or through a pipe where that cannot be had.

torch's loader pickles a batch in a background thread of the worker. An error there reaches no one, and the training process
waits forever. So a worker pickles its batch itself, where an error can still become an answer.
"""

import pickle
import traceback
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

from runtime.environment import SHARED_MEMORY, shared_memory_bytes

_RESERVE_BYTES = 1 << 30

_withdrawn = ""
"""In a worker: why it uses the pipe from now on. Trying again could leave a part of a batch in shared memory each time."""


@dataclass(frozen=True)
class Delivery:
    """A batch as the training process receives it. `pipe_reason`: why it came through the pipe. `failure`: why there is none."""

    batch: Any = None
    pipe_reason: str = ""
    failure: str = ""

    def pin_memory(self) -> "Delivery":
        """Pin the batch, as torch's loader does with a batch that comes alone."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


class _Pickled:
    """A batch that is pickled already, so that pickling it in another thread cannot fail."""

    def __init__(self, content: bytes, pipe_reason: str = "", failure: str = "") -> None:
        self._fields = (content, pipe_reason, failure)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, self._fields


def _unpickle(content: bytes, pipe_reason: str, failure: str) -> Delivery:
    return Delivery(pickle.loads(content) if content else None, pipe_reason, failure)


def hand_over(batch: Any) -> _Pickled:
    """Pickle a batch in its worker. Raises nothing: what fails becomes a text that the training process reads."""
    try:
        return _pickled(batch)
    except Exception:
        return _Pickled(b"", failure=traceback.format_exc())


def _pickled(batch: Any) -> _Pickled:
    global _withdrawn
    reason = _withdrawn or _no_room()
    if not reason:
        try:
            # The content of tensors goes to shared memory. torch reserves it, so a lack of it is an error, not SIGBUS.
            return _Pickled(bytes(ForkingPickler.dumps(batch)))
        # torch raises RuntimeError for shared memory. A socket or a descriptor that cannot be had is an OSError.
        except (RuntimeError, OSError) as error:
            reason = _withdrawn = str(error)
    return _Pickled(pickle.dumps(batch, pickle.HIGHEST_PROTOCOL), reason)


def _no_room() -> str:
    """Return why a batch must not go to shared memory now: some stays free for NCCL, MPI and semaphores. Empty if it may."""
    try:
        total, free = shared_memory_bytes()
    except OSError:
        return ""
    if free >= min(total // 2, _RESERVE_BYTES):
        return ""
    return f"{SHARED_MEMORY} has {free / 2**20:.1f} of {total / 2**20:.1f} MiB free"

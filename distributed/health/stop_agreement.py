"""Agree on the step after which all ranks stop, over the ranks' connections to the monitor.

Any rank may ask for a stop; the first reason counts. Rank 0 chooses the last step, and does not begin its next step before every
rank knows the choice. No rank can finish a step without rank 0's gradients, so no rank can be past the last step by then.
"""

import threading
from collections.abc import Callable

from .messages import LastStep, LastStepAgreed, LastStepKnown, Message, StopRequest, StopWanted


class StopAgreement:
    """A rank's part. The main thread asks and waits, the control channel's thread calls `receive`."""

    def __init__(self, rank: int, send: Callable[[Message], None]) -> None:
        self._rank, self._send = rank, send
        self._reason: str | None = None
        """The reason that counts on all ranks."""
        self._last_step: int | None = None
        self._has_requested = False
        self._reason_known = threading.Event()
        self._last_step_agreed = threading.Event()

    def receive(self, message: Message) -> None:
        """Handle a message of the monitor; ignores those that are not about a stop."""
        if isinstance(message, StopWanted):
            self._reason = message.reason
            self._reason_known.set()
        elif isinstance(message, LastStep):
            self._last_step = message.step
            self._send(LastStepKnown())
        elif isinstance(message, LastStepAgreed):
            self._last_step_agreed.set()

    def request(self, reason: str) -> None:
        """Ask all ranks to stop after a common step, once."""
        if not self._has_requested:
            self._has_requested = True
            self._send(StopRequest(reason))

    def is_wanted(self) -> bool:
        """Return whether any rank has asked for a stop. Ranks learn of it at different moments."""
        return self._reason is not None

    def reason(self) -> str:
        """Return the reason of a stop that a rank has asked for, the same on all ranks."""
        self._reason_known.wait()
        assert self._reason is not None
        return self._reason

    def reason_after(self, step: int, steps_in_flight: int) -> str | None:
        """Return the reason to stop after this step, or None. Every rank calls it after the reduction of each step.

        `steps_in_flight`: steps that a host may run ahead of its device, and so ahead of rank 0's gradients.
        """
        if self._rank == 0 and self._reason is not None and not self._last_step_agreed.is_set():
            self._send(LastStep(step + 1 + steps_in_flight))
            # A rank that never answers is dead or stopped: the monitor ends the job.
            self._last_step_agreed.wait()
        if self._last_step is None or step < self._last_step:
            return None
        return self.reason()


class StopRelay:
    """The monitor's part: relays the first reason and the last step, and counts who knows the last step."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._last_step: int | None = None
        self._know_last_step: set[int] = set()
        self._is_agreed = False

    def replies(self, rank: int, message: Message, ranks: set[int]) -> list[tuple[int, Message]]:
        """Return the messages to send because of this one from `rank`, each with its receiver; `ranks`: those still connected."""
        if isinstance(message, StopRequest) and self._reason is None:
            self._reason = message.reason
            return [(each, StopWanted(message.reason)) for each in sorted(ranks)]
        if isinstance(message, LastStep) and rank == 0 and self._last_step is None:
            self._last_step = message.step
            return [(each, message) for each in sorted(ranks)]
        if isinstance(message, LastStepKnown):
            self._know_last_step.add(rank)
            if not self._is_agreed and ranks <= self._know_last_step:
                self._is_agreed = True
                return [(0, LastStepAgreed())]
        return []

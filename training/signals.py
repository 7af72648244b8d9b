"""Catch the signals that ask a job to stop after a checkpoint."""

import os
import signal
from types import FrameType, TracebackType
from typing import ClassVar

from runtime.exit_codes import EXIT_INTERRUPTED, EXIT_REQUEUE


class StopSignal:
    """Context that records SIGINT, SIGTERM and SIGUSR1 instead of dying of them. A second Ctrl-C exits at once."""

    EXIT_CODES: ClassVar[dict[str, int]] = {
        "SIGINT": EXIT_INTERRUPTED,
        "SIGTERM": EXIT_REQUEUE,
        "SIGUSR1": EXIT_REQUEUE,
    }

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {name: signal.signal(getattr(signal, name), self._note) for name in self.EXIT_CODES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, handler in self._previous.items():
            signal.signal(getattr(signal, name), handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.received == "SIGINT":
            os._exit(EXIT_INTERRUPTED)
        self.received = name

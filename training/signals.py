"""Catch the signals that ask a job to stop after a checkpoint."""

import signal
from types import FrameType, TracebackType

from runtime import stop_signals


class StopSignal:
    """Context that records the stop signals (runtime.stop_signals) and does nothing else. A second Ctrl-C exits at once.

    A signal that arrived just before counts too. After the context signals are still only noted, until `set_action`.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._note) for number in stop_signals.handled()}
        stop_signals.set_action(None)
        self.received = self.received or stop_signals.received()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.received == "SIGINT":
            stop_signals.exit_interrupted()
        self.received = name

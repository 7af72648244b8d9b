"""Handle the signals that ask a process to stop, from the first line of a program on.

By default Python dies of SIGTERM, SIGUSR1, SIGHUP (its terminal is gone) and SIGXCPU (a limit of CPU time) without a word.
Its own handlers run in the main thread only between two Python instructions, so one call that waits in C (MPI's or torch's
start-up, a missing file server) would hold them up. So the kernel's signal also wakes a thread, which ends the process. That
thread's work changes with the phase (`set_action`).
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from .console import open_closed_streams
from .error_report import report_error
from .exit_codes import EXIT_INTERRUPTED, EXIT_REQUEUE

EXIT_CODES = {
    "SIGINT": EXIT_INTERRUPTED,
    "SIGTERM": EXIT_REQUEUE,
    "SIGUSR1": EXIT_REQUEUE,
    "SIGHUP": EXIT_REQUEUE,
    "SIGXCPU": EXIT_REQUEUE,
}
"""The signals that ask for a stop, and the exit code of a process that stops for each."""

_ENDS_WITH = ("TORCHELASTIC_RUN_ID", "TSM_LOCAL_RANK")
"""Variables of the launchers whose ranks would outlive them: torchrun and launch/local.py."""

_PR_SET_PDEATHSIG = 1

NUMBERS = tuple(getattr(signal, name) for name in EXIT_CODES)

_REPORT_S = 1.0

Action = Callable[[str], None]


class Stopped(KeyboardInterrupt):
    """A stop signal, raised in the main thread (`raise_in_main_thread`)."""

    def __init__(self, name: str) -> None:
        super().__init__(f"stopped by {name}")
        self.exit_code = EXIT_CODES[name]


class _State:
    installed = False
    received: str | None = None
    action: Action | None = None
    acting = False
    before_exit: Callable[[], None] | None = None


def handle_stop_signals() -> None:
    """Install the handlers: until `set_action`, a stop signal ends the process at once with its code. Call it first.

    A rank of torchrun or launch/local.py also gets SIGTERM when its launcher is killed. A launcher that was killed before this
    call leaves ranks that cannot find each other.

    For entry points only, under `if __name__ == "__main__"`: loader workers import those files too.
    """
    # The pipe must not get the number of a closed stream.
    open_closed_streams()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    _State.installed, _State.action = True, _exit_at_once
    # Before the handlers, so that the thread acts on the first signal that they catch.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in handled():
        signal.signal(number, _note)
    threading.Thread(target=_watch, args=(reader,), name="stop-signals", daemon=True).start()
    if any(name in os.environ for name in _ENDS_WITH):
        # Their main thread starts the ranks: the kernel sends this signal when the thread that started a process ends.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def handled() -> list[int]:
    """Return the numbers of the signals to handle: all but a SIGHUP that nohup made this process ignore."""
    return [number for number in NUMBERS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]


def set_action(action: Action | None) -> None:
    """Call `action` with the signal's name, in a thread, for each stop signal from now on. None: only note the signal."""
    _State.action = action


def received() -> str | None:
    """Return the name of the newest stop signal that this process has received, if any."""
    return _State.received


def set_before_exit(report: Callable[[], None]) -> None:
    """Call `report`, for a second at most, before a second Ctrl-C ends the process."""
    _State.before_exit = report


def exit_interrupted() -> NoReturn:
    """Exit for a second Ctrl-C."""
    if _State.before_exit is not None:
        # In a thread, because this handler may have interrupted the main thread with a lock in its hands that `report` needs.
        reporting = threading.Thread(target=_State.before_exit, daemon=True)
        reporting.start()
        reporting.join(_REPORT_S)
    os._exit(EXIT_INTERRUPTED)


def wait_for_action() -> None:
    """Do not return if an action is at work: it ends this process, and says why. For the main thread, on an error."""
    while _State.acting:
        time.sleep(0.1)


def raise_in_main_thread() -> None:
    """Raise Stopped in the main thread for each stop signal from now on, for programs that clean up. Ctrl-C does so anyway."""
    if not _State.installed:
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    for number in handled():
        signal.signal(number, stop)
    # After the handlers: until then the thread acts.
    _State.action = None


@contextmanager
def hidden_from_children() -> Iterator[None]:
    """Block the stop signals in this thread. A process that is started meanwhile inherits that, so none reaches it.

    This process still handles them, in the thread of `handle_stop_signals`; ignoring them here would lose one.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _note(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if name == "SIGINT" and _State.received == "SIGINT":
        exit_interrupted()
    _State.received = name


def _watch(reader: int) -> None:
    """Act on the signals that the kernel's handler has written to the pipe, a byte each: the body of the thread."""
    while True:
        for number in os.read(reader, 64):
            name = signal.Signals(number).name
            if name in EXIT_CODES and (action := _State.action) is not None:
                _State.acting = True
                action(name)
                _State.acting = False


def _exit_at_once(name: str) -> None:
    report_error("start-up", f"stopped by {name} before anything was done. Fix: run the same command again")
    os._exit(EXIT_CODES[name])

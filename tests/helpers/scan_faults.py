"""Functions that worker processes of prepare.py run in tests; workers import them by name, so they need their own file."""

import os
import signal
import time
from pathlib import Path


def die_on_bad(item: str) -> str:
    """Echo the item in upper case, or fail as the item says.

    `kill` and `segfault` send a signal to this process, `once FILE` kills it the first time only, `exit` exits, `raise`
    raises, and `sleep FILE` writes the pid and sleeps.
    """
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "exit":
        os._exit(7)
    if item == "raise":
        raise ValueError("a fault of the program")
    if item.startswith("once "):
        mark = Path(item.removeprefix("once "))
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if item.startswith("sleep "):
        Path(item.removeprefix("sleep ")).write_text(str(os.getpid()))
        time.sleep(600)
    return item.upper()


def fail(task: object) -> object:
    raise ValueError("a fault of the program")

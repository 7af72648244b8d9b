"""What worker processes of prepare.py run in tests; in a file of its own because they import it by name."""

import os
import signal
import time
from pathlib import Path


def die_on_bad(item: str) -> str:
    """Kill the own process on `kill`, on `once FILE` the first time only, exit on `exit`; raise on `raise`; otherwise echo."""
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

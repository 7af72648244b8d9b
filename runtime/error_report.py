"""Report the error that ends a process: as its last line, and to torchrun, whose own summary would hide it."""

import json
import os
import sys
import time
from contextlib import suppress


def report_error(where: str, message: str) -> None:
    """Print `error (WHERE): MESSAGE` as one line to standard error, and write it to torchrun's error file, if there is one."""
    line = f"error ({where}): {in_one_line(message)}"
    # Standard error may be closed.
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    tell_torchrun(line)


def tell_torchrun(text: str) -> None:
    """Write the file that torchrun reads when this process fails: it prints `py_callstack` as the cause, here the error itself.

    The format is that of torch.distributed.elastic.multiprocessing.errors. Under other launchers there is no such file.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    details = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": text, "extraInfo": details}}, file)


def in_one_line(message: str) -> str:
    """Join the lines of a message, so that cause and fix stand in its last line."""
    return "; ".join(line.strip() for line in message.splitlines() if line.strip())

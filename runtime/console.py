"""Standard streams that do no harm: closed ones are opened, and errors of writing to a terminal, pipe or file are ignored.

A job's output is also in its log. A closed terminal, `| head` or a full disk must not end it. Programs whose output is their
result, such as plan.py, do not ignore errors.
"""

import io
import os
import sys
from contextlib import suppress
from typing import Any


def open_closed_streams() -> None:
    """Open /dev/null for each standard stream that is closed, or the next file that is opened gets its number, and its text.

    Python has None for such a stream, which print() takes, and csv.writer and others do not.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def ignore_write_errors() -> None:
    """Replace sys.stdout and sys.stderr by streams that lose text instead of raising OSError, also at the interpreter's exit."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None:
            with suppress(OSError):
                stream.flush()
        raw = _UnfailingFile(number, "w", closefd=False)
        wrapped = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding="utf-8" if stream is None else stream.encoding,
            errors="backslashreplace",
            line_buffering=number == 2 or getattr(stream, "line_buffering", False),
            write_through=getattr(stream, "write_through", False),
        )
        setattr(sys, name, wrapped)


class _UnfailingFile(io.FileIO):
    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        try:
            # None from a full pipe that does not block.
            return super().write(data) or size
        except OSError:
            return size

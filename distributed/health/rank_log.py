"""A process' log: rank 0's lies in the run folder, those of other ranks on their node, gathered when something fails.

A line is `TIME  HOST  rank R  TEXT` (or `monitor`), so that the logs of many ranks can be merged by `sort`.
"""

import faulthandler
import getpass
import json
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from runtime import run_layout
from runtime.atomic_write import write_text

_TAIL_BYTES = 64 << 10


class Journal:
    """Everything that this process says; before `open_in` it is kept in memory. Safe to use from any thread."""

    def __init__(self, who: int | str, host: str) -> None:
        """`who`: a rank, or the name of a process that writes into rank 0's log too."""
        self._who, self._host = who, host
        self._started = datetime.now()
        self._lock = threading.Lock()
        self._waiting: list[str] = []
        self._file: TextIO | None = None
        self.folder: Path | None = None
        """The run folder, once it is known."""

    def open_in(self, folder: Path) -> None:
        """Write to the run's log from now on. Never raises: a job can run without its log, on a full disk say."""
        self.folder = folder
        on_node = isinstance(self._who, int) and self._who > 0
        path = node_log(folder.name, int(self._who)) if on_node else folder / run_layout.LOG
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._file = path.open("a", buffering=1)
                self._file.writelines(self._waiting)
            faulthandler.enable(self._file)  # a crash of the interpreter leaves its stacks here
            self.note(f"process {os.getpid()} logs from here on")
        except OSError as error:
            print(f"no log in {path}: {error.strerror}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing more is to be said."""
        with self._lock:
            if self._file is not None:
                faulthandler.disable()
                self._file.close()
                self._file = None

    def note(self, text: str) -> None:
        """Write lines to the log alone."""
        lines = self._stamped(text)
        with self._lock:
            if self._file is None:
                self._waiting.append(lines)
                return
            try:
                self._file.write(lines)
            except OSError:  # the disk is full: whoever watches still sees it
                return

    def _stamped(self, text: str) -> str:
        who = f"rank {self._who}" if isinstance(self._who, int) else self._who
        stamp = f"{datetime.now().astimezone().isoformat(timespec='milliseconds')}  {self._host}  {who}  "
        return "".join(f"{stamp}{line}\n" for line in text.splitlines())

    def warn(self, text: str) -> None:
        """Write lines to the log, and to standard error for whoever watches."""
        self.note(text)
        with suppress(OSError):  # nobody watches any more
            print(text, file=sys.stderr, flush=True)

    def outcome(self, exit_code: int, reason: str) -> None:
        """Leave word in the run folder of how this start ended: launchers report a code of their own."""
        if self.folder is not None:
            text = json.dumps({"exit_code": exit_code, "reason": reason, "time_s": round(time.time(), 3)})
            with suppress(OSError):
                write_text(self.folder / run_layout.OUTCOME, text + "\n")

    def keep(self, name: str, text: str) -> str:
        """Write what was gathered at a failure into the run folder's `failures/`; returns where it is, or why it is not."""
        if self.folder is None:
            return "not kept: the job has no run folder yet"
        path = self.folder / run_layout.FAILURES / f"{self._started:%Y%m%d-%H%M%S}" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            return f"not kept: {path}: {error.strerror}"
        return str(path)

    def tail(self) -> str:
        """The end of this process' log."""
        if self._file is None:
            return "".join(self._waiting)
        return read_tail(Path(self._file.name))


def node_log(run_id: str, rank: int) -> Path:
    """Where a rank other than 0 logs: on its node, since thousands of files on a shared file system would bring it down."""
    return Path(tempfile.gettempdir()) / f"tsm-{getpass.getuser()}" / run_id / f"rank-{rank:05d}.log"


def read_tail(path: Path) -> str:
    """The end of a log; says so where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"(no log: {error})\n"

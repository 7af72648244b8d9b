"""The log of a process: rank 0's is in the run folder, those of other ranks on their node, gathered after a failure.

A line is `TIME  HOST  rank R  TEXT` (or `monitor`), so that `sort` merges the logs of many ranks.
"""

import errno
import faulthandler
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from io import TextIOWrapper
from itertools import islice
from logging.handlers import MemoryHandler
from pathlib import Path

from runtime import run_layout
from runtime.atomic_write import write_text
from runtime.lease import other_holder
from runtime.private_folder import open_private_file, private_folder, private_folders

from .final_report import start_report

_TAIL_BYTES = 64 << 10

_OLD_S = 14 * 86400.0
_OLD_LOGS_LOOKED_AT = 10_000


class RankLog:
    """The log of this process, in memory until `open_in`. Safe to use from any thread; never raises OSError."""

    def __init__(self, who: int | str, host: str) -> None:
        """`who`: a rank, or the name of a process that also writes to rank 0's log."""
        self._who = who
        self._started = datetime.now()
        self._formatter = _LineFormatter(host, f"rank {who}" if isinstance(who, int) else who)
        self._memory = MemoryHandler(sys.maxsize, flushLevel=sys.maxsize)
        # Not from logging.getLogger: Hydra and libraries reconfigure the loggers there.
        self._logger = logging.Logger(__name__, logging.INFO)
        self._logger.addHandler(self._memory)
        self._file: _LogFile | None = None
        self.folder: Path | None = None
        """The run folder, once it is known."""
        self._lock = ""

    def open_in(self, folder: Path, lock: str = "") -> None:
        """Write to the run's log from now on, starting with the lines in memory. A job continues without its log if it must.

        `lock`: content of the run's lock file while this job holds it; empty: there is none.
        """
        self.folder, self._lock = folder, lock
        on_node = isinstance(self._who, int) and self._who > 0
        note = None
        try:
            if on_node:
                private, note = private_folder()
                file = _LogFile(private / _name_on_node(folder.name, int(self._who)), open_private_file)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                file = _LogFile(folder / run_layout.LOG)
        except OSError as error:
            _print_error(f"no log in {error.filename or folder}: {error.strerror}")
            return
        file.setFormatter(self._formatter)
        self._file = file
        self._memory.setTarget(file)
        # From now on every record is passed on to the file at once.
        self._memory.flushLevel = logging.NOTSET
        # After a crash of the interpreter, the log has its stacks.
        assert file.stream is not None
        faulthandler.enable(file.stream)
        self.info(f"process {os.getpid()} logs here from now on")
        if note:
            self.warning(f"log: {note}")

    @property
    def path(self) -> Path | None:
        """The file of this log, once it is open."""
        return None if self._file is None else Path(self._file.baseFilename)

    def close(self) -> None:
        """Close the file; later lines stay in memory."""
        if self._file is not None:
            faulthandler.disable()
            self._memory.setTarget(None)
            self._memory.flushLevel = sys.maxsize
            with suppress(OSError):
                self._file.close()
            self._file = None

    def info(self, text: str) -> None:
        """Write lines to the log only."""
        if text:
            self._logger.info(text)

    def warning(self, text: str) -> None:
        """Write lines to the log and to standard error."""
        self.info(text)
        _print_error(text)

    def write_outcome(self, exit_code: int, reason: str) -> None:
        """Write how this start ended into the run folder: launchers report an exit code of their own.

        A job that another one has replaced leaves the other's outcome alone.
        """
        if self.folder is not None and self._owns_folder():
            text = json.dumps({"exit_code": exit_code, "reason": reason, "time_s": round(time.time(), 3)})
            with suppress(OSError):
                write_text(self.folder / run_layout.OUTCOME, text + "\n")

    def start_report(self) -> "subprocess.Popen[bytes] | None":
        """Start to write report.html of the run folder, if there is a run in it, and return the process without waiting for it."""
        if self.folder is not None and (self.folder / run_layout.CONFIG).exists() and self._owns_folder():
            try:
                return start_report(self.folder)
            except (OSError, subprocess.SubprocessError) as error:
                self.info(f"report: not started: {error}")
        return None

    def _owns_folder(self) -> bool:
        """Return False if another job has taken the run folder over."""
        assert self.folder is not None
        return not self._lock or other_holder(self.folder / run_layout.LOCK, self._lock) is None

    def write_failure_file(self, name: str, text: str) -> str:
        """Write a file into the run folder's `failures/`; returns its path, or why it was not written."""
        if self.folder is None:
            return "not written: the job has no run folder yet"
        path = self.folder / run_layout.FAILURES / f"{self._started:%Y%m%d-%H%M%S}" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            return f"not written: {path}: {error.strerror}"
        return str(path)

    def tail(self) -> str:
        """Return the end of this process' log."""
        if self._file is None:
            return "".join(f"{self._formatter.format(record)}\n" for record in list(self._memory.buffer))
        return read_tail(Path(self._file.baseFilename))


class _LineFormatter(logging.Formatter):
    """Starts every line of a text with time, host and process."""

    def __init__(self, host: str, who: str) -> None:
        super().__init__()
        self._host, self._who = host, who

    def format(self, record: logging.LogRecord) -> str:
        time_text = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        start = f"{time_text}  {self._host}  {self._who}  "
        return "\n".join(start + line for line in record.getMessage().splitlines())


class _LogFile(logging.FileHandler):
    """A log file whose errors do not end the program, for example on a full disk; it reports the first one."""

    _has_failed = False

    def __init__(self, path: Path, opener: Callable[[str, int], int] | None = None) -> None:
        self._opener = opener
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=self._opener)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self._has_failed:
            self._has_failed = True
            _print_error(f"no log in {self.baseFilename}: {sys.exc_info()[1]}")


def node_log(run_id: str, rank: int) -> Path:
    """Return the log file of a rank other than 0, on its node: thousands of files would overload a shared file system.

    It is the newest, if an earlier start had to use another private folder. Raises FileNotFoundError if there is none.
    """
    name = _name_on_node(run_id, rank)
    found = [folder / name for folder in private_folders() if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(errno.ENOENT, "no log on this node", str(name))
    return max(found, key=_modified_s)


def read_node_log(run_id: str, rank: int) -> str:
    """Return the end of the log of a rank other than 0, on its node, or a line that says why there is none."""
    try:
        return read_tail(node_log(run_id, rank))
    except OSError as error:
        return f"(no log: {error})\n"


def remove_old_logs(run_id: str) -> None:
    """Remove this user's logs of other runs on this node that nothing was written to for 14 days. Never raises OSError."""
    with suppress(OSError):
        logs = (log for folder in private_folders() for log in folder.glob("*/rank-*.log"))
        for log in islice(logs, _OLD_LOGS_LOOKED_AT):
            if log.parent.name == run_id or time.time() - _modified_s(log) < _OLD_S:
                continue
            # Other processes may do the same now; a folder goes with its last log.
            with suppress(OSError):
                log.unlink()
                log.parent.rmdir()


def _name_on_node(run_id: str, rank: int) -> Path:
    return Path(run_id) / f"rank-{rank:05d}.log"


def _modified_s(path: Path) -> float:
    """Return when a file was written to; 0 for a file that does not exist."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def read_tail(path: Path) -> str:
    """Return the end of a log, or a line that says why there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"(no log: {error})\n"


def _print_error(text: str) -> None:
    # Standard error may be closed.
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)

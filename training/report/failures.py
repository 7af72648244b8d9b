"""Read what a failed start left: stacks of a hang, logs of the ranks, and the signal of a crash."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from runtime import run_layout

_SHOWN_CHARACTERS = 20_000
_SHOWN_LINES = 20
_CRASH_LINES = 600
_TAIL_BYTES = 64 << 10
_MOST_FILES = 8

# As faulthandler writes them into the log of a process that crashes.
_FATAL = re.compile(r"Fatal Python error: ([A-Za-z ]+)")
_SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Illegal instruction": "SIGILL",
    "Floating point exception": "SIGFPE",
    "Floating-point exception": "SIGFPE",
}


@dataclass(frozen=True)
class Part:
    """A file of a failure, or the end of one."""

    title: str
    text: str


def failure_parts(folder: Path) -> list[Part]:
    """Return the newest failure's stacks and logs, stacks first, and the end of log.txt."""
    files = _newest_failure(folder)
    stacks = [file for file in files if file.name == "stacks.txt"]
    logs = [file for file in files if file.name != "stacks.txt"]
    parts = [Part(_title(folder, file), _beginning(file)) for file in stacks]
    if lines := last_lines(folder / run_layout.LOG, _SHOWN_LINES):
        parts.append(Part(f"{run_layout.LOG}, its last lines (rank 0 and the monitor)", "\n".join(lines)))
    parts += [Part(_title(folder, file), "\n".join(last_lines(file, _SHOWN_LINES))) for file in logs[:_MOST_FILES]]
    if len(logs) > _MOST_FILES:
        parts.append(Part(f"{len(logs) - _MOST_FILES} more logs are in {logs[0].parent.name}", ""))
    return parts


def fatal_signal(folder: Path, rank: int) -> str | None:
    """Return the signal of the crash that ends a rank's log; None if no log of it ends so."""
    logs = [folder / run_layout.LOG] if rank == 0 else []
    logs += [file for file in _newest_failure(folder) if file.name == f"rank-{rank:05d}.log"]
    for log in logs:
        found = _FATAL.findall("\n".join(last_lines(log, _CRASH_LINES)))
        if found:
            return next((name for text, name in _SIGNALS.items() if found[-1].startswith(text)), found[-1])
    return None


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a text file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


def _newest_failure(folder: Path) -> list[Path]:
    """Return the files of the newest failure of the newest start."""
    # A folder's name is the time of its start. The newest start made the newest provenance and outcome, and no other folder.
    failures = [each for each in (folder / run_layout.FAILURES).glob("*") if each.is_dir()]
    newest = max(failures, key=lambda each: each.name, default=None)
    return [] if newest is None else sorted(file for file in newest.iterdir() if file.is_file())


def _title(folder: Path, file: Path) -> str:
    return str(file.relative_to(folder))


def _beginning(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"(cannot be read: {error.strerror})"
    left_out = len(text) - _SHOWN_CHARACTERS
    return text if left_out <= 0 else f"{text[:_SHOWN_CHARACTERS]}\n... {left_out:,} more characters in {path.name}"

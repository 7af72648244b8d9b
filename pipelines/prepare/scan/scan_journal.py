"""The scan journal: results of a scan as JSON lines, flushed one by one, so that a killed scan resumes where it stopped."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from pipelines.prepare.errors import DataSetError
from runtime.file_lock import file_lock

from .scan_clip import ClipFacts

VERSION = 3
"""Raise it when the scan finds other facts in the same file: clips recorded by an older version are then scanned again."""


@dataclass(frozen=True)
class Scanned:
    """The result of scanning one path: `facts` of a good clip, or the `reason` why it is bad."""

    path: str
    """As in the manifest: relative to the manifest's folder, or absolute. For frames: their folder."""
    size: int
    """Bytes of the file, or of all frames."""
    mtime_ns: int
    """Modification time of the file; for frames the newest of the folder and its frames."""
    facts: ClipFacts | None = None
    reason: str = ""
    pattern: str = ""
    """For frames: pattern of the file names, `%05d.jpg`."""
    first: int = 0
    """For frames: number of the first file."""
    missing: bool = False
    """Nothing exists at the path."""

    @property
    def reusable(self) -> bool:
        """Tell whether a later scan may reuse this. A missing clip has no size and time that would show a change."""
        return not self.missing and self.mtime_ns > 0


@contextmanager
def open_journal(path: Path) -> Iterator[tuple[dict[str, Scanned], "ScanJournal"]]:
    """Yield the newest record of each path, and the journal to add to. Locked: one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path, wait=False) as ours:
        if not ours:
            raise DataSetError(f"{path} is in use: another prepare.py is scanning this data set. Fix: wait for its end")
        with open(path, "a+", encoding="utf-8") as file:
            known, ends_with_newline = _read(file)
            if not ends_with_newline:
                # End the partial line that a killed scan left.
                file.write("\n")
            yield known, ScanJournal(file)


class ScanJournal:
    """Appends records to an open journal file."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, scanned: Scanned) -> None:
        """Append a record, unless a later scan could not reuse it."""
        if scanned.reusable:
            self._file.write(json.dumps({"version": VERSION, **asdict(scanned)}) + "\n")
            # Hand it to the kernel, so that killing this process loses nothing.
            self._file.flush()


def _read(file: TextIO) -> tuple[dict[str, Scanned], bool]:
    """Return the newest record of each path, and whether the file ends with a newline.

    Lines that are no complete record of this version are skipped, so their clips are scanned again.
    """
    file.seek(0)
    known: dict[str, Scanned] = {}
    line = "\n"
    for line in file:
        try:
            scanned = _record(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        if scanned is not None:
            known[scanned.path] = scanned
    return known, line.endswith("\n")


def _record(fields: dict[str, Any]) -> Scanned | None:
    if fields.pop("version") != VERSION:
        return None
    facts = fields.pop("facts")
    return Scanned(**fields, facts=None if facts is None else ClipFacts(**facts))

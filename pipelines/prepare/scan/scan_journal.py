"""What has been scanned so far, as JSON lines that are written as they come: a killed scan goes on where it stopped."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from pipelines.prepare.errors import DataSetError
from runtime.file_lock import lock_open_file

from .scan_clip import ClipFacts

VERSION = 2  # raise it when the scan finds other facts in the same file: what an older one wrote is then scanned again


@dataclass(frozen=True)
class Scanned:
    """What a scan found at one path. `facts` of a good clip, otherwise `reason`."""

    path: str
    """As the manifest has it: relative to its folder, or absolute; of frames the folder."""
    size: int
    mtime_ns: int
    """Of frames: the bytes of all, and the newest change of the folder or a frame."""
    facts: ClipFacts | None = None
    reason: str = ""
    pattern: str = ""
    """Of frames: the files' names, `%05d.jpg`."""
    first: int = 0
    """Of frames: the number of the first file."""
    missing: bool = False
    """There is nothing at the path."""

    @property
    def lasting(self) -> bool:
        """Whether an unchanged file needs no second scan. What is missing has no size and time to be known again by."""
        return not self.missing and self.mtime_ns > 0


@contextmanager
def open_journal(path: Path) -> Iterator[tuple[dict[str, Scanned], "Journal"]]:
    """The newest record of each path, and the journal to add to; one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        if not lock_open_file(file, wait=False):
            raise DataSetError(f"{path} is in use: another prepare.py scans this data set; wait for its end")
        known, whole = _read(file)
        if not whole:
            file.write("\n")  # the last line of a killed scan: ours must not be glued to it
        yield known, Journal(file)


class Journal:
    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, scanned: Scanned) -> None:
        if scanned.lasting:
            self._file.write(json.dumps({"version": VERSION, **asdict(scanned)}) + "\n")
            self._file.flush()  # to the system, so that killing this process loses nothing


def _read(file: TextIO) -> tuple[dict[str, Scanned], bool]:
    """A line that is not a whole record of this version is passed over: its file is scanned again."""
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

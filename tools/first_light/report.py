"""The report, a JSON file that is complete on disk at any time, and the results of the running phase."""

import json
import os
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from runtime.atomic_write import write_text

from .settings import CHECKOUT, Settings

REPORT = "first_light.json"

Case = TypeVar("Case")


def running_file(settings: Settings, phase: str) -> Path:
    """Return the file with the results so far of a phase that is running."""
    return settings.out / f"running_{phase}.json"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write atomically. The first line has the first key and value, which in a report tell if its figures are meaningful."""
    text = json.dumps(value, indent=1, default=str)
    write_text(path, "{" + text[1:].lstrip() + "\n")


class Results:
    """Results of a phase by title. Each is written to disk immediately, with the device's name and the seconds that it took."""

    def __init__(self, settings: Settings, phase: str) -> None:
        self.settings, self.phase = settings, phase
        self._file = running_file(settings, phase)
        self._rows: dict[str, dict[str, Any]] = {}
        self._write()

    @contextmanager
    def row(self, title: str) -> Iterator[dict[str, Any]]:
        """Provide a row to fill in. An exception becomes its `error`, so that later rows still run."""
        fields: dict[str, Any] = {"device": self.settings.device_name}
        self._rows[title] = fields
        started_s = time.monotonic()
        try:
            yield fields
        except Exception as error:
            fields["error"] = f"{type(error).__name__}: {error}"[:1500]
            fields["where"] = _places(error)
        fields.setdefault("duration_s", round(time.monotonic() - started_s, 2))
        self._write()

    def each(self, cases: Mapping[str, Case], needs_s: float = 3.0) -> Iterator[tuple[str, Case]]:
        """Yield the cases in order while at least `needs_s` seconds are left; list the others as skipped."""
        for title, case in cases.items():
            if self.settings.left_s() < needs_s:
                with self.row(title) as fields:
                    fields["skipped"] = "no time"
            else:
                yield title, case

    def _write(self) -> None:
        write_json(self._file, self._rows)


def _places(error: Exception) -> list[str]:
    """Return file and line of the project's stack frames, innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(CHECKOUT)]
    return [f"{os.path.relpath(frame.filename, CHECKOUT)}:{frame.lineno}" for frame in ours][-4:]


def errors(rows: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """Yield (title, first line of the error) of the rows that failed."""
    for title, fields in rows.items():
        if "error" in fields:
            yield title, (str(fields["error"]).strip().splitlines() or ["no message"])[0]

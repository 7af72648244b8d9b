"""What became of a split's clips, and the file that names those that were left out."""

import csv
import io
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from runtime.atomic_write import atomic_write

from .errors import DataSetError

BAD_FILES_NAME = "bad_files.csv"


@dataclass
class SplitReport:
    listed: int
    written: int = 0
    unchanged: int = 0
    """Not scanned again."""
    missing: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason)."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    miscounted: list[str] = field(default_factory=list)
    """Clips with another number of frames than their list says."""
    codecs: Counter[str] = field(default_factory=Counter)


def write_bad_files(path: Path, reports: dict[str, SplitReport]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "reason", "split"])
    for split, report in reports.items():
        writer.writerows([name, reason, split] for name, reason in [*report.bad, *report.missing])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


def refuse_bad(root: Path, split: str, report: SplitReport, max_bad: float, max_missing: float) -> None:
    """Raises DataSetError when more than `max_bad` or `max_missing` (parts of a split) are unusable, or all."""
    for unusable, limit, option, what in (
        (report.missing, max_missing, "--max-missing", "are not there"),
        (report.bad, max_bad, "--max-bad", "cannot be decoded"),
    ):
        part = len(unusable) / report.listed
        if part > limit or part == 1:
            more = f"Mend them, or allow more with {option} {math.ceil(part * 1000) / 1000}"
            raise DataSetError(
                f"{split}: {len(unusable)} of {report.listed} clips {what}, more than {limit:.2%} of them, so no "
                f"manifest is written. The first: {unusable[0][1]}. All: {root / BAD_FILES_NAME}. "
                f"{'Check --videos and --annotations' if part == 1 else more}"
            )
    if not report.written:
        raise DataSetError(f"{split}: no clip is left; all reasons are in {root / BAD_FILES_NAME}")

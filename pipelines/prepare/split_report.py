"""The result of preparing a split: counts of its clips, and the file that lists the clips left out."""

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
    """Counts of one split's clips."""

    listed: int
    written: int = 0
    unchanged: int = 0
    """Clips reused from an earlier scan."""
    missing: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason)."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason)."""
    miscounted: list[str] = field(default_factory=list)
    """Clips whose number of frames differs from the annotation's."""
    codecs: Counter[str] = field(default_factory=Counter)
    not_fast: int = 0
    """Videos that PyAV decodes, from their first frame, because torchcodec's frames are not known to be right."""
    not_tried: int = 0
    """Videos that were not compared, because torchcodec does not load here."""


def check_fraction(option: str, value: float) -> None:
    """Raise DataSetError unless the option's value is a fraction of a split."""
    if not 0 <= value <= 1:
        raise DataSetError(f"{option} is {value}. Fix: give a fraction from 0 to 1, like 0.05")


def write_bad_files(path: Path, reports: dict[str, SplitReport]) -> None:
    """Write a CSV file of all clips left out, with the reason and split of each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "reason", "split"])
    for split, report in reports.items():
        writer.writerows([name, reason, split] for name, reason in [*report.bad, *report.missing])
    with atomic_write(path) as file:
        # Names that are not UTF-8 keep their bytes.
        file.write(text.getvalue().encode(errors="surrogateescape"))


def refuse_bad(root: Path, split: str, report: SplitReport, max_bad: float, max_missing: float) -> None:
    """Raise DataSetError when all clips, or a larger fraction than `max_bad` or `max_missing`, are unusable."""
    for unusable, limit, option, what in (
        (report.missing, max_missing, "--max-missing", "do not exist"),
        (report.bad, max_bad, "--max-bad", "cannot be decoded"),
    ):
        fraction = len(unusable) / report.listed
        if fraction > limit or fraction == 1:
            raise DataSetError(
                f"{split}: {len(unusable)} of {report.listed} clips {what}, more than the limit of {limit:.2%}, so no "
                f"manifest is written. The first: {unusable[0][1]}. All: {root / BAD_FILES_NAME}. "
                f"Fix: {_fix(fraction, option)}"
            )
    if not report.written:
        raise DataSetError(
            f"{split}: every clip is bad or missing. Fix: repair the clips, for the reasons in {root / BAD_FILES_NAME}"
        )


def _fix(fraction: float, option: str) -> str:
    if fraction == 1:
        return "check --videos and --annotations" if option == "--max-missing" else "repair the clips"
    return f"repair the clips, or allow more with {option} {math.ceil(fraction * 1000) / 1000}"

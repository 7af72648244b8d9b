"""Lines of a summary that several sub-commands print."""

from pathlib import Path

from pipelines.prepare.split_report import BAD_FILES_NAME, SplitReport


def print_left_out(folder: Path, reports: dict[str, SplitReport]) -> None:
    """Print how many clips were left out, if any, and where they are listed."""
    lost = sum(len(report.bad) + len(report.missing) for report in reports.values())
    if lost:
        print(f"  LEFT OUT: {lost} clips, listed with reasons in {folder / BAD_FILES_NAME}")


def describe_counts(report: SplitReport) -> str:
    """Return the number of a split's clips, and of the bad ones, if any."""
    bad = f", {len(report.bad)} BAD ({len(report.bad) / report.listed:.2%})" if report.bad else ""
    return f"{report.written} of {report.listed} clips{bad}"

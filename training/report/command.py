"""The command of report.py: write the report of any run folder, and print how the run stands."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from runtime import run_layout
from runtime.error_report import in_one_line, report_error
from runtime.exit_codes import EXIT_CONFIG, EXIT_DONE
from training.errors import ConfigError

from .comparison import compare
from .history import History
from .html import progress_of, write_report
from .mllog import write_mllog
from .rates import rates_of
from .status import Status

# A run folder has at least one of them, however early the run was killed.
_FILES = (
    run_layout.CONFIG,
    run_layout.METRICS,
    run_layout.PROVENANCE,
    run_layout.LOG,
    run_layout.OUTCOME,
    run_layout.LOCK,
)


def run_report(arguments: Sequence[str], description: str) -> int:
    """Write the report of the run folder that the arguments name, and return the exit code."""
    parser = argparse.ArgumentParser(
        "report.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, outputs/NAME")
    parser.add_argument("--mllog", type=Path, metavar="FILE", help="also write the records as an MLPerf-style log")
    options = parser.parse_args(arguments)
    try:
        folder = _run_folder(options.run)
        try:
            status = write_report(folder)
            history = History.read(folder)
            lines = [*_describe(folder, history, status), f"report: {folder / run_layout.REPORT}"]
            if options.mllog is not None:
                if not history.starts:
                    raise ConfigError(
                        f"{folder} has no start record, so there is nothing to log. Fix: leave out --mllog"
                    )
                lines.append(f"mllog: {options.mllog}, {write_mllog(folder, history, status, options.mllog)} lines")
        except OSError as error:
            raise ConfigError(
                f"cannot write {error.filename}: {error.strerror}. Fix: copy the run folder to a place that you may write to"
            ) from error
    except ConfigError as error:
        report_error("report", str(error))
        return EXIT_CONFIG
    print("\n".join(lines), flush=True)
    return EXIT_DONE


def _run_folder(named: Path) -> Path:
    if not named.is_dir():
        raise ConfigError(f"there is no folder {named}. Fix: report.py outputs/NAME")
    if not any((named / name).exists() for name in _FILES):
        raise ConfigError(f"{named} is no run folder: it has none of {', '.join(_FILES)}. Fix: report.py outputs/NAME")
    return named.resolve()


def _describe(folder: Path, history: History, status: Status) -> list[str]:
    lines = [f"{folder.name}: {status.word} {progress_of(history)}"]
    if status.reason:
        lines.append(f"reason: {in_one_line(status.reason)}")
    if status.signal:
        lines.append(f"signal: {status.signal}")
    last = max((record["step"] for record in history.checkpoint if "failed" not in record), default=None)
    lines.append(
        f"last step: {history.steps} by the records, checkpoint: {'none recorded' if last is None else f'step {last}'}"
        f"{f', failed at {status.place} (steps count from 0 there)' if status.place else ''}"
    )
    rates = rates_of(history)
    if rates is not None:
        lines.append(
            f"clips/s: {rates.whole_job:.1f} whole job, {rates.training:.1f} training, {rates.compute:.1f} compute only"
        )
    lines.append(f"plan: {compare(folder, history).note}")
    return lines

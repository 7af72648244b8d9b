"""Write report.html of a run folder: of a finished run, one that failed or was killed, or one that still runs.

    python report.py outputs/NAME
    python report.py outputs/NAME --mllog outputs/NAME/mllog.txt

Prints how the run stands: finished, stopped, failed, killed or running, with the reason, the signal and the last step as far as
the folder tells. --mllog also writes the records as an MLPerf-style log. Needs no GPU and no data, and changes nothing else in the
folder. docs/operating.md describes the page.
"""

import sys

from runtime.environment import start_program
from runtime.gc_freeze import frozen_imports
from runtime.stop_signals import handle_stop_signals


def main() -> None:
    with frozen_imports():
        from training.report.command import run_report

    sys.exit(run_report(sys.argv[1:], __doc__ or ""))


if __name__ == "__main__":
    handle_stop_signals()
    start_program()
    main()

"""Test and measure this checkout on one GPU in nine minutes; write a JSON report, and print a one-screen summary last.

bash tools/first_light/first_light.sh                   on a machine with a GPU, with the packages from wheels.sh
python -m tools.first_light --out FOLDER                the same, if the environment is complete
python -m tools.first_light --out FOLDER --dry          the same program on the CPU with tiny sizes, to test its logic

On the fake GPU (tests/fake_gpu) it runs its CUDA code with tiny sizes. The report then marks its figures as meaningless.
"""

import argparse
import importlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .phases import DEFAULT_LIMIT_S, PHASES, run_phases
from .processes import adopt_orphans
from .report import REPORT, Results
from .settings import CHECKOUT, WARNINGS, Settings, find_mode
from .summary import print_summary


def run_one_phase(arguments: list[str]) -> None:
    """Run one phase in this process, which runs no other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--phase", required=True)
    Settings.add_arguments(parser)
    options = parser.parse_args(arguments)
    settings = Settings.parse(options)
    module, _, name = options.phase.partition(":")
    getattr(importlib.import_module(module), name)(Results(settings, settings.device_name()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--limit-s", type=float, default=DEFAULT_LIMIT_S, help="seconds for everything")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--only", default="", help="names of phases, by comma")
    parser.add_argument("--nccl", type=Path, help="an NCCL library that lets two ranks share a GPU (2.30 and later)")
    parser.add_argument("--commit", help="which commit this is, where git does not know")
    return parser.parse_args()


def commit_of(checkout: Path) -> str:
    asked = subprocess.run(["git", "log", "-1", "--format=%H %s"], cwd=checkout, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown: no git repository here"


def main() -> int:
    started_s = time.monotonic()
    # Exiting kills the running phase.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options = parse_arguments()
    names = [name for name in options.only.split(",") if name] or [phase.name for phase in PHASES]
    unknown = set(names) - {phase.name for phase in PHASES}
    if unknown:
        sys.exit(f"first light: no phase {', '.join(sorted(unknown))}. Fix: --only {','.join(p.name for p in PHASES)}")
    mode = find_mode(options.dry)
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "warning": WARNINGS[mode],
        "mode": mode,
        "started": time.strftime("%FT%TZ", time.gmtime()),
        "commit": options.commit or commit_of(CHECKOUT),
        "limit_s": options.limit_s,
    }
    with tempfile.TemporaryDirectory(prefix="first_light_", ignore_cleanup_errors=True) as work:
        settings = Settings(mode, options.out.resolve(), Path(work), started_s + options.limit_s, options.nccl)
        run_phases([phase for phase in PHASES if phase.name in names], settings, report)
    print_summary(report)
    print(f"report: {options.out / REPORT}", flush=True)
    return 0


if __name__ == "__main__":
    adopt_orphans()
    if "--phase" in sys.argv[1:2]:
        run_one_phase(sys.argv[1:])
    else:
        sys.exit(main())

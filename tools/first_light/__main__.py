"""Test and measure this checkout on one GPU in nine minutes; write a JSON report, and print a one-screen summary last.

bash tools/first_light/first_light.sh                   on a machine with a GPU, with the packages from wheels.sh
python -m tools.first_light --out FOLDER                the same, if the environment is complete
python -m tools.first_light --out FOLDER --dry          the same program on the CPU with tiny sizes, to test its logic

On the fake GPU (tests/fake_gpu) it runs its CUDA code with tiny sizes. The report then marks its figures as meaningless.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .forks import run_forked
from .phases import DEFAULT_LIMIT_S, PHASES, run_phases
from .processes import adopt_orphans
from .report import REPORT
from .settings import CHECKOUT, WARNINGS, Mode, Settings, find_mode, name_of_device
from .summary import print_summary

DEVICE_LIMIT_S = 40.0


TINY_ENVIRONMENT = {
    # Several processes with many threads oversubscribe few cores, and a tiny network does not profit from a second thread.
    "OMP_NUM_THREADS": "1",
    # The fake GPU can load compiled kernels only through Triton's own launcher, not through Inductor's.
    "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0",
}


def prepare_forks(mode: Mode) -> None:
    """Import what the phases need, so that their processes start at once. Nothing here may initialise CUDA."""
    # torch.cuda.is_available() asks the driver's library NVML, instead of CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.update(TINY_ENVIRONMENT if mode != "gpu" else {})
    for phase in PHASES:
        importlib.import_module(phase.function.partition(":")[0])


def ask_device_name(mode: Mode, folder: Path) -> str:
    """Return the device's name, or why there is none, from a process of its own."""
    answer = folder / "device_name"
    for _, ended in run_forked({"name": lambda: answer.write_text(name_of_device(mode))}, lambda _: DEVICE_LIMIT_S):
        if ended.outcome != "ok":
            return f"no device: {ended.outcome}: {(ended.output.splitlines() or [''])[-1]}"
    return answer.read_text()


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
        prepare_forks(mode)
        name = ask_device_name(mode, Path(work))
        print(f"{name}; imports took {time.monotonic() - started_s:.1f} s", flush=True)
        settings = Settings(mode, options.out.resolve(), Path(work), started_s + options.limit_s, name, options.nccl)
        run_phases([phase for phase in PHASES if phase.name in names], settings, report)
    print_summary(report)
    print(f"report: {options.out / REPORT}", flush=True)
    return 0


if __name__ == "__main__":
    adopt_orphans()
    sys.exit(main())

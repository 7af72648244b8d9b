"""Arguments that several sub-commands share."""

import argparse
import os
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add `--workers`."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=_process_count, default=cores, help=f"processes ({cores}); 0: work in this process"
    )


def _process_count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes. Fix: give 0 (work in this one) or more")
    return int(text)

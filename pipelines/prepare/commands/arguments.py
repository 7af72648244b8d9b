"""Arguments that several sub-commands share."""

import argparse
import os
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

PART_HELP = (
    "this part of the work, like 1/8 (default in a Slurm array: the task's); the last to finish writes the manifests"
)


def add_root_command(commands: Commands, name: str, what: str) -> argparse.ArgumentParser:
    """Add a sub-command on a data set that has manifests, with `--root` and `--workers`."""
    parser = commands.add_parser(name, help=what, description=what)
    parser.add_argument("--root", type=Path, required=True, help="folder of the manifests")
    add_workers(parser)
    return parser


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

"""`prepare.py shapes` and `prepare.py motions`: write a generated data set."""

import argparse
import os
import time
from pathlib import Path

from pipelines.prepare.shapes.write import MOTIONS, SHAPES, GeneratedConfig, Kind, write_generated

from .arguments import Commands

_HELP = {
    SHAPES.name: "clips of moving shapes, in pairs of classes that differ only in the order of frames",
    MOTIONS.name: "clips of moving textures, whose classes differ by motion only: for optical flow",
}


def add_shapes(commands: Commands) -> None:
    """Add the sub-commands `shapes` and `motions`."""
    for kind in (SHAPES, MOTIONS):
        _add_kind(commands, kind)


def _add_kind(commands: Commands, kind: Kind) -> None:
    default = GeneratedConfig(kind)
    multiple = f"a multiple of {len(kind.classes)}"
    parser = commands.add_parser(
        kind.name, help=_HELP[kind.name], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("data") / kind.name, help="folder to write")
    parser.add_argument("--train-clips", type=int, default=default.train_clips, help=multiple)
    parser.add_argument("--val-clips", type=int, default=default.val_clips, help=multiple)
    parser.add_argument("--size", type=int, default=default.size, help="height and width in pixels")
    parser.add_argument("--frames", type=int, nargs="+", default=default.frames, help="lengths that a clip may have")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that draw and encode"
    )
    parser.add_argument("--force", action="store_true", help="replace clips that were made with other parameters")
    parser.set_defaults(run=run_generate, kind=kind)


def run_generate(args: argparse.Namespace) -> None:
    """Write the data set, and print a summary."""
    start_s = time.perf_counter()
    config = GeneratedConfig(args.kind, args.train_clips, args.val_clips, args.size, tuple(args.frames), args.seed)
    written = write_generated(args.root, config, args.workers, args.force)
    clips = " and ".join(f"{count} {split}" for split, count in written.rows.items())
    done = f"{written.new_clips} clips written" if written.new_clips else "already complete"
    print(
        f"{args.root}: {clips} clips of {len(config.kind.classes)} classes, {written.bytes / 1e6:.1f} MB; "
        f"{done}, {time.perf_counter() - start_s:.1f} s"
    )

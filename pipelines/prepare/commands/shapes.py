"""`prepare.py shapes`: write the generated data set."""

import argparse
import os
import time
from pathlib import Path

from pipelines.prepare.shapes.drawing import CLASSES
from pipelines.prepare.shapes.write import ShapesConfig, write_shapes

from .arguments import Commands


def add_shapes(commands: Commands) -> None:
    """Add the sub-command `shapes`."""
    default = ShapesConfig()
    parser = commands.add_parser(
        "shapes",
        help="clips of moving shapes, in pairs of classes that differ only in the order of frames",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=Path("data/shapes"), help="folder to write")
    parser.add_argument("--train-clips", type=int, default=default.train_clips, help=f"a multiple of {len(CLASSES)}")
    parser.add_argument("--val-clips", type=int, default=default.val_clips, help=f"a multiple of {len(CLASSES)}")
    parser.add_argument("--size", type=int, default=default.size, help="height and width in pixels")
    parser.add_argument("--frames", type=int, nargs="+", default=default.frames, help="lengths that a clip may have")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that draw and encode"
    )
    parser.add_argument("--force", action="store_true", help="replace clips that were made with other parameters")
    parser.set_defaults(run=run_shapes)


def run_shapes(args: argparse.Namespace) -> None:
    """Write the data set, and print a summary."""
    start_s = time.perf_counter()
    config = ShapesConfig(args.train_clips, args.val_clips, args.size, tuple(args.frames), args.seed)
    written = write_shapes(args.root, config, args.workers, args.force)
    clips = " and ".join(f"{count} {split}" for split, count in written.rows.items())
    done = f"{written.new_clips} clips written" if written.new_clips else "already complete"
    print(
        f"{args.root}: {clips} clips of {len(CLASSES)} classes, {written.bytes / 1e6:.1f} MB; "
        f"{done}, {time.perf_counter() - start_s:.1f} s"
    )

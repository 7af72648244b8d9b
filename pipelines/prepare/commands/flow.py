"""`prepare.py flow`: the optical flow of a data set that has manifests."""

import argparse
import time
from pathlib import Path

from pipelines.prepare.flow.compute_flow import compute_flow
from pipelines.prepare.flow.optical_flow import METHODS
from pipelines.prepare.repack.job_array import find_part

from .arguments import PART_HELP, Commands, add_root_command
from .summary import describe_counts, print_left_out


def add_flow(commands: Commands) -> None:
    """Add the sub-command `flow`."""
    parser = add_root_command(
        commands, "flow", "compute the optical flow of a data set's clips, as grey images (needs OpenCV)"
    )
    parser.add_argument("--to", type=Path, required=True, help="folder of the flow images and their manifests")
    parser.add_argument(
        "--method", choices=METHODS, default="dis", help="tvl1: as TSN's tool, and many times slower (dis)"
    )
    tar = "a tar file for each clip, in place of a folder of images: fewer files, for prepare.py shard to pack"
    parser.add_argument("--tar", action="store_true", help=tar)
    parser.add_argument("--max-bad", type=float, default=0.05, help="fraction of a split's clips that may fail (0.05)")
    parser.add_argument("--part", metavar="I/N", help=PART_HELP)
    parser.set_defaults(run=run_flow)


def run_flow(args: argparse.Namespace) -> None:
    """Compute the flow, and print a summary."""
    start_s = time.perf_counter()
    done = compute_flow(args.root, args.to, args.method, args.tar, args.workers, find_part(args.part), args.max_bad)
    took = f"{done.new} computed in {time.perf_counter() - start_s:.1f} s" if done.new else "already complete"
    if done.missing:
        print(f"{args.to}: {took}; {done.left}")
        return
    print(f"{args.to}: {took}")
    for name, report in done.splits.items():
        size, pairs = done.bytes_after[name], done.frames_after[name]
        print(
            f"  {args.to / name}.arrow: {describe_counts(report)}, {pairs} pairs of frames, "
            f"{size / 1e6:.1f} MB, {size / report.written / 1e3:.1f} KB per clip, {size / pairs / 1e3:.1f} KB per pair"
        )
    print_left_out(args.to, done.splits)

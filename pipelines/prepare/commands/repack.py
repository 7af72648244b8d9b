"""`prepare.py transcode`, `shard`, `verify` and `stage`: commands on a data set that has manifests."""

import argparse
import socket
import time
from pathlib import Path

from pipelines.decoding.staged_copies import VARIABLE
from pipelines.prepare.errors import DataSetError
from pipelines.prepare.repack.encoders import ENCODERS
from pipelines.prepare.repack.job_array import find_part
from pipelines.prepare.repack.shard import parse_bytes, write_shards
from pipelines.prepare.repack.stage import Steps, parse_range, stage
from pipelines.prepare.repack.transcode import transcode
from pipelines.prepare.repack.transcode_clip import Settings
from pipelines.prepare.repack.verify import verify

from .arguments import PART_HELP, Commands, add_root_command
from .summary import describe_counts, print_left_out


def add_repack(commands: Commands) -> None:
    """Add the sub-commands transcode, shard, verify and stage."""
    _add_transcode(commands)
    _add_shard(commands)
    _add_verify(commands)
    _add_stage(commands)


def _add_transcode(commands: Commands) -> None:
    what = "encode the clips of a data set again: smaller, key frames close together, the same frames"
    parser = add_root_command(commands, "transcode", what)
    parser.add_argument("--to", type=Path, required=True, help="folder of the new clips and their manifests")
    parser.add_argument("--codec", choices=list(ENCODERS), default="h264", help="jpeg: a file for each frame (h264)")
    parser.add_argument("--short-side", type=int, default=256, help="pixels of the shorter side; never enlarged (256)")
    parser.add_argument("--gop", type=int, default=16, help="frames from one key frame to the next (16)")
    qualities = ", ".join(f"{name} {each.quality} of 1 to {each.worst}" for name, each in ENCODERS.items())
    parser.add_argument("--quality", type=int, help=f"the encoder's quality number; lower is better ({qualities})")
    parser.add_argument("--max-bad", type=float, default=0.05, help="fraction of a split's clips that may fail (0.05)")
    parser.add_argument("--part", metavar="I/N", help=PART_HELP)
    parser.set_defaults(run=run_transcode)


def _add_shard(commands: Commands) -> None:
    what = "pack a data set into tar files of similar size, with manifests of each clip's offset in them"
    parser = add_root_command(commands, "shard", what)
    parser.add_argument("--to", type=Path, required=True, help="folder of the shards and their manifests")
    parser.add_argument("--shard-size", default="1GB", help="maximum size of a shard, approximately (1GB)")
    parser.add_argument("--part", metavar="I/N", help=PART_HELP)
    parser.set_defaults(run=run_shard)


def _add_verify(commands: Commands) -> None:
    parser = add_root_command(commands, "verify", "compare every shard and every clip of a folder with its manifests")
    parser.add_argument("--decode", action="store_true", help="also decode every frame of every clip")
    parser.set_defaults(run=run_verify)


def _add_stage(commands: Commands) -> None:
    parser = add_root_command(
        commands, "stage", "copy a data set's shards or files to this node's disk, as many as fit"
    )
    parser.add_argument(
        "--to", type=Path, required=True, help=f"folder of the copies; set {VARIABLE} to it for training"
    )
    parser.add_argument("--shards", metavar="A:B", help="only these shards, in the order of shards.json")
    parser.add_argument("--steps", type=int, help="only the training clips of this number of steps")
    parser.add_argument("--first-step", type=int, default=0, help="first of these steps (0)")
    parser.add_argument("--global-batch", type=int, help="global batch of the run, for --steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run, for --steps (0)")
    parser.set_defaults(run=run_stage)


def run_transcode(args: argparse.Namespace) -> None:
    """Transcode, and print a summary."""
    start_s = time.perf_counter()
    quality = ENCODERS[args.codec].quality if args.quality is None else args.quality
    settings = Settings(args.codec, args.short_side, args.gop, quality)
    done = transcode(args.root, args.to, settings, args.workers, find_part(args.part), args.max_bad)
    took = f"{done.new} encoded in {time.perf_counter() - start_s:.1f} s" if done.new else "already complete"
    if done.missing:
        print(f"{args.to}: {took}; {done.left}")
        return
    print(f"{args.to}: {took}")
    for name, report in done.splits.items():
        before, after = done.bytes_before[name], done.bytes_after[name]
        print(
            f"  {args.to / name}.arrow: {describe_counts(report)}, {before / 1e6:.1f} MB before, "
            f"{after / 1e6:.1f} MB after ({after / before:.2f}), {after / report.written / 1e3:.1f} KB per clip"
        )
    print_left_out(args.to, done.splits)


def run_shard(args: argparse.Namespace) -> None:
    """Write shards, and print a summary."""
    start_s = time.perf_counter()
    try:
        shard_bytes = parse_bytes(args.shard_size)
    except ValueError as error:
        raise DataSetError(f"--shard-size: {error}") from None
    sharded = write_shards(args.root, args.to, shard_bytes, args.workers, find_part(args.part))
    took = f"{sharded.new} written in {time.perf_counter() - start_s:.1f} s" if sharded.new else "already complete"
    if sharded.index is None:
        print(f"{args.to}: {took}; {sharded.missing} shards are left for other parts or a later call")
        return
    shards = sharded.index.shards.values()
    print(f"{args.to}: {len(shards)} shards, {sum(each.bytes for each in shards) / 1e9:.3g} GB; {took}")


def run_verify(args: argparse.Namespace) -> None:
    """Verify, and print every fault; raises DataSetError if there is one."""
    start_s = time.perf_counter()
    verified = verify(args.root, args.workers, args.decode)
    for line in verified.bad:
        print(f"BAD {line}")
    checked = f"{verified.clips} clips" + (f" in {verified.shards} shards" if verified.shards else "")
    if verified.bad:
        raise DataSetError(f"{args.root}: {len(verified.bad)} faults in {checked}. Fix: see the lines above")
    print(f"{args.root}: {checked}, no fault; {time.perf_counter() - start_s:.1f} s")


def run_stage(args: argparse.Namespace) -> None:
    """Stage files, and print a summary. A file that cannot be copied is no error: training reads the shared one."""
    start_s = time.perf_counter()
    try:
        shards = None if args.shards is None else parse_range(args.shards)
    except ValueError as error:
        raise DataSetError(f"--shards: {error}") from None
    staged = stage(args.root, args.to, args.workers, shards, _steps(args))
    here = socket.gethostname()
    for reason in staged.bad:
        print(f"{here}: {reason}: reading the shared file")
    if staged.left:
        print(
            f"{here}: no room in {args.to} for {staged.left} of {staged.wanted} files of {args.root}: reading the shared ones"
        )
    print(
        f"{here}: {args.root}: {staged.copied} files copied to {args.to} ({staged.copied_bytes / 1e9:.3g} GB, "
        f"{time.perf_counter() - start_s:.1f} s), {staged.present} present before, of {staged.wanted}"
    )


def _steps(args: argparse.Namespace) -> Steps | None:
    if args.steps is None:
        return None
    if args.shards is not None:
        raise DataSetError("--steps and --shards exclude each other. Fix: give one of them")
    if args.global_batch is None or min(args.steps, args.global_batch) < 1 or args.first_step < 0:
        raise DataSetError(
            "--steps needs the run's --global-batch. Fix: give both, 1 or more, and --first-step 0 or more"
        )
    return Steps(args.first_step, args.steps, args.global_batch, args.seed)

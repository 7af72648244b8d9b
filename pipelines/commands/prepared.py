"""`prepare.py shard` and `verify`: what is made of a data set's manifests."""

import argparse
import os
import time
from pathlib import Path

from ..datasets.annotations import DataSetError
from ..prepared.parts import find_part
from ..prepared.shard import parse_bytes, write_shards
from ..prepared.verify import verify

_PART_HELP = (
    "this part of the work, like 1/8 (in a Slurm array: the task's own); the last to finish writes the manifests"
)


def add_prepared(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    _add_shard(commands)
    _add_verify(commands)


def _add_shard(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    what = "tar files of about one size with the clips of a data set, and manifests that say where in them each clip is"
    parser = _add(commands, "shard", what)
    parser.add_argument("--to", type=Path, required=True, help="folder of the shards and their manifests")
    parser.add_argument("--shard-size", default="1GB", help="about the size of a shard (1GB)")
    parser.add_argument("--part", metavar="I/N", help=_PART_HELP)
    parser.set_defaults(run=run_shard)


def _add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add(commands, "verify", "look whether every shard and every clip is what the manifests of a folder say")
    parser.add_argument("--decode", action="store_true", help="decode every frame of every clip as well")
    parser.set_defaults(run=run_verify)


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, what: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what)
    parser.add_argument("--root", type=Path, required=True, help="folder of the manifests")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"processes ({cores}); 0: work in this process")
    return parser


def run_shard(args: argparse.Namespace) -> None:
    start_s = time.perf_counter()
    try:
        shard_bytes = parse_bytes(args.shard_size)
    except ValueError as error:
        raise DataSetError(f"--shard-size: {error}") from None
    sharded = write_shards(args.root, args.to, shard_bytes, args.workers, find_part(args.part))
    took = f"{sharded.new} written in {time.perf_counter() - start_s:.1f} s" if sharded.new else "already there"
    if sharded.index is None:
        print(f"{args.to}: {took}; {sharded.missing} shards are left to other parts, or to a further call")
        return
    shards = sharded.index.shards.values()
    print(f"{args.to}: {len(shards)} shards, {sum(each.bytes for each in shards) / 1e9:.3g} GB; {took}")


def run_verify(args: argparse.Namespace) -> None:
    """Prints what is bad, and raises DataSetError if something is."""
    start_s = time.perf_counter()
    verified = verify(args.root, args.workers, args.decode)
    for line in verified.bad:
        print(f"BAD {line}")
    looked_at = f"{verified.clips} clips" + (f" in {verified.shards} shards" if verified.shards else "")
    if verified.bad:
        raise DataSetError(f"{args.root}: {len(verified.bad)} faults in {looked_at}; each has a line above")
    print(f"{args.root}: {looked_at}, all as they should be; {time.perf_counter() - start_s:.1f} s")

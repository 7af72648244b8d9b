"""Prepare a data set: write its manifests, one per split, after decoding each clip once; repack it, compute its optical flow.

    python prepare.py shapes                           # renders 1,200 small clips that need a temporal model
    python prepare.py motions                          # the same many, whose classes differ by motion only
    python prepare.py kinetics --root data/kinetics400
    python prepare.py something-v2                     # also something-v1, jester, ucf101, hmdb51
    python prepare.py folder --root data/mine --val-fraction 0.1
    python prepare.py list --root data/mine --train train.txt --val val.txt --classes classes.txt
    python prepare.py transcode --root data/kinetics400 --to data/kinetics400_256
    python prepare.py shard --root data/kinetics400 --to data/kinetics400_shards
    python prepare.py flow --root data/kinetics400 --to data/kinetics400_flow
    python prepare.py verify --root data/kinetics400_shards
    python prepare.py stage --root data/kinetics400_shards --to /local/disk/staged

A second call scans only new and changed clips; an interrupted call resumes where it stopped. docs/data.md describes the
folder layout that each data set needs.
"""

import argparse
import sys

from runtime.environment import start_program
from runtime.exit_codes import EXIT_INTERRUPTED
from runtime.stop_signals import Stopped, handle_stop_signals, raise_in_main_thread


# Imports stand inside the functions, because each worker process imports this file again, as __mp_main__.
def make_parser() -> argparse.ArgumentParser:
    from pipelines.prepare.commands.datasets import add_datasets
    from pipelines.prepare.commands.flow import add_flow
    from pipelines.prepare.commands.repack import add_repack
    from pipelines.prepare.commands.shapes import add_shapes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_shapes(commands)
    add_datasets(commands)
    add_repack(commands)
    add_flow(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    from pipelines.errors import BadClip
    from pipelines.manifest import ManifestError
    from pipelines.prepare.errors import DataSetError
    from runtime.environment import EnvironmentFault, repair

    args = make_parser().parse_args(argv)
    raise_in_main_thread()
    try:
        for note in repair():
            print(note, file=sys.stderr)
        args.run(args)
    except (DataSetError, ManifestError, BadClip, EnvironmentFault) as error:
        print(f"prepare.py {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"prepare.py {args.command}: interrupted. Fix: run the same command again to resume", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Stopped) else EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    handle_stop_signals()
    start_program()
    sys.exit(main())

"""Build, cache, install and prove Horovod for the installed torch: `make horovod`.

    .venv/bin/python -m tools.horovod               # up to date: well under a second
    .venv/bin/python -m tools.horovod --explain     # print what would be chosen, and why
    .venv/bin/python -m tools.horovod --build-only  # fill the wheel cache, install nothing

Horovod's last release (2023) compiles against today's torch only with a newer C++ standard, and against a CUDA torch
only with a CUDA toolkit. The first needs an edit of the source; the second is found or laid out here. In order:

1. choose   CUDA, NCCL, MPI, C++ standard: the machine's if it has them, else those of pip packages, else CPU only
2. look up  the wheel cache, keyed by everything that the binary depends on
3. build    in a work folder; only a finished wheel is renamed into the cache, so an interrupted build leaves nothing
4. install  into the environment of the Python that runs this
5. prove    one all-reduce of two processes over Gloo, and over MPI if MPI was built in

Environment variables (load the site's CUDA and MPI modules first):
    HOROVOD_CUDA_HOME or CUDA_HOME              a CUDA toolkit
    HOROVOD_NCCL_HOME, NCCL_HOME or NCCL_ROOT   an NCCL other than torch's
    HOROVOD_CUDA=off                            CPU only
    HOROVOD_MPI=off                             without MPI, for machines that have none
    HOROVOD_BUILD_CUDA_CC_LIST                  GPU generations, as in 70,80,90
    JOBS                                        number of parallel compilers
"""

import argparse
import sys
from pathlib import Path

from runtime.file_lock import file_lock

from .build import install, stamp_of, up_to_date, wheel_for
from .choose import explain, make_plan
from .commands import BuildError
from .prove import prove


def make(args: argparse.Namespace) -> None:
    """Run the five steps of the module's docstring."""
    plan = make_plan()
    stamp = stamp_of(plan.key)
    if up_to_date(plan.key) and not (args.explain or args.build_only):
        print(f"{stamp.read_text().strip()} (up to date)")
        return
    explain(plan)
    if args.explain:
        return
    wheel = wheel_for(plan)
    if args.build_only:
        return
    install(wheel)
    try:
        proof = prove(plan)
    except BuildError as error:
        raise BuildError(
            f"{error}\n  built and installed, but it does not work. To build it again: rm -r {wheel.parent}"
        ) from None
    for old in stamp.parent.glob(".horovod-*"):
        old.unlink()
    stamp.write_text(proof + "\n")
    print(proof)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.horovod", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--explain", action="store_true", help="print what would be chosen, and stop")
    parser.add_argument("--build-only", action="store_true", help="fill the wheel cache, install nothing")
    args = parser.parse_args()
    try:
        # Two installs into one environment at the same time would leave half of each.
        with file_lock(Path(sys.prefix) / ".horovod.lock"):
            make(args)
    except BuildError as error:
        sys.exit(f"horovod: {error}")
    except KeyboardInterrupt:
        sys.exit("horovod: interrupted; nothing unfinished is kept, the next call starts again")


if __name__ == "__main__":
    main()

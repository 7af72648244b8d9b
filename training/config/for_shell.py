"""Answer questions of shell scripts about a configuration, so that only Python reads overrides and YAML.

python -m training.config.for_shell folder JOB_ID RESTARTS ARGUMENTS...      run_id and run folder of a batch job
python -m training.config.for_shell values KEY... -- ARGUMENTS...            values of these keys

ARGUMENTS are those of train.py: overrides, or --run FOLDER. Prints one line for each answer. Errors go to stderr, with exit code 2.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from operator import attrgetter

from runtime.checkout import CHECKOUT
from runtime.run_names import why_no_folder_name
from training.errors import ConfigError

from .command_line import flags_for_hydra, parse
from .compose import compose
from .named_run import find_run
from .overrides import read_overrides, text_value
from .schema import Config


def main(arguments: Sequence[str]) -> int:
    """Print the answers and return the exit code."""
    question, *rest = arguments
    try:
        if question == "folder":
            job_id, restarts, *given = rest
            answers = folder_of(given, job_id, restarted=int(restarts) > 0)
        else:
            end = rest.index("--")
            answers = values_of(rest[:end], rest[end + 1 :])
        if any("\n" in answer for answer in answers):
            raise ConfigError(f"a line break in one of {answers}. Fix: paths without line breaks")
    except ConfigError as error:
        print(f"error (start-up): {error}", file=sys.stderr)
        return error.exit_code
    print(*answers, sep="\n")
    return 0


def folder_of(arguments: Sequence[str], job_id: str, restarted: bool) -> list[str]:
    """Return run_id and run folder of a batch job.

    A restarted job finds its folder even if the checkout has changed so that its overrides no longer compose.
    """
    try:
        config = _compose(arguments)
        run_id, outputs = config.run_id, config.outputs
    except ConfigError:
        if not restarted:
            raise
        run_id, outputs = _last(arguments, "run_id"), _last(arguments, "outputs") or Config.outputs
        if run_id is not None and why_no_folder_name(run_id):
            raise
    run_id = job_id if run_id is None else run_id
    return [run_id, str(CHECKOUT / outputs / run_id)]


def _compose(arguments: Sequence[str]) -> Config:
    options = parse("train", arguments)
    if flags := flags_for_hydra(options):
        raise ConfigError(
            f"a launch script starts one run, and does not take {flags[0]}. Fix: python train.py {flags[0]} ..."
        )
    folder = None if options.run is None else find_run(options.run)[0]
    return compose(options.overrides, folder, options.config_dir)


def _last(arguments: Sequence[str], key: str) -> str | None:
    """Return the last value that overrides give to the key, whatever the others are."""
    value = None
    for typed in arguments:
        with suppress(ConfigError):
            for override in read_overrides([typed]).all:
                if override.key == key:
                    value = text_value(key, override.text)
    return value


def values_of(keys: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Return values of the composed configuration, or of the run folder after --run; data.root is absolute."""
    config = _compose(arguments)
    config.data.root = str(CHECKOUT / config.data.root)
    return [str(attrgetter(key)(config)) for key in keys]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The command line of train.py, evaluate.py and plan.py."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from training.errors import ConfigError

from .compose import composed
from .load import explain, load_run, register
from .named_run import find_run
from .overrides import CONF
from .sweep import overrides_for_hydra
from .yaml_text import check_files

# World sizes of plan.py --sweep.
_SWEEP = "[8,16,32,64,96,128,192,256,384,512,768,1024,1536,2048,3072,4096]"

Read = Callable[[], DictConfig]
"""A function that composes the configuration, or raises ConfigError."""

FromRun = Callable[[Sequence[str], str, Path | None], DictConfig]
"""Composes the configuration of `--run FOLDER`, from the overrides, FOLDER as typed, and a folder of more options."""


def execute(
    program: str, arguments: Sequence[str], start: Callable[[Read], int], from_run: FromRun | None = None
) -> int:
    """Call `start` with a function that composes the configuration, and return the exit code of `start`.

    `--multirun` calls it for each job of the sweep, up to one that fails. `--cfg` and `--help` only print. An error in the
    arguments is raised by the function that `start` gets, so that `start` reports it like any other. `from_run`: how the
    program composes with --run; None: it takes the run's config.yaml as it is.
    """
    try:
        options = parse(program, arguments)
        if flags := flags_for_hydra(options):
            return _hydra_main(program, flags, options, start)
    except ConfigError as error:
        return start(partial(_fail, error))
    if options.run is None:
        return start(cache(partial(composed, options.overrides, None, options.config_dir)))
    return start(cache(partial(from_run or _as_started, options.overrides, options.run, options.config_dir)))


def _as_started(overrides: Sequence[str], named: str, extra: Path | None) -> DictConfig:
    """Read the configuration with which a run was started."""
    folder, checkpoint = find_run(named)
    if checkpoint is not None:
        raise ConfigError(f"--run {named} is a checkpoint, and a run resumes from its newest. Fix: --run {folder}")
    return load_run(folder)


def _fail(error: ConfigError) -> NoReturn:
    raise error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. Fix: python {self.prog} --help")


def parse(program: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Return `overrides`, `run`, `config_dir` and Hydra's own options. Raises ConfigError for unknown ones."""
    parser = _Parser(f"{program}.py", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--run")
    if program == "evaluate":
        parser.add_argument("--explain", action="store_const", const="evaluation.explain=12", dest="shorthand")
    if program == "plan":
        parser.add_argument("--sweep", action="store_const", const=f"plan.sweep={_SWEEP}", dest="shorthand")
    # Hydra's own.
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--hydra-help", action="store_true")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    options = parser.parse_intermixed_args(arguments)
    if getattr(options, "shorthand", None):
        # First, so that a value that is given as an override counts.
        options.overrides.insert(0, options.shorthand)
    if options.config_dir is not None and not options.config_dir.is_dir():
        raise ConfigError(f"--config-dir {options.config_dir} is no folder. Fix: a folder with experiment/NAME.yaml")
    if options.run is not None:
        if program == "plan":
            raise ConfigError("plan.py plans what overrides give, not a run folder. Fix: leave out --run")
        if program == "train" and options.overrides:
            raise ConfigError(
                "train.py --run FOLDER takes all from FOLDER/config.yaml, and no overrides. Fix: leave them out, or leave out "
                f"--run and give all overrides of the run, with run_id={Path(options.run).name}"
            )
        if flags_for_hydra(options):
            raise ConfigError("--run composes nothing. Fix: leave out Hydra's options")
    return options


def flags_for_hydra(options: argparse.Namespace) -> list[str]:
    """Return the options that make Hydra compose, for a sweep or to print; empty: the program composes itself."""
    flags = [
        f"--{name.replace('_', '-')}"
        for name in ("multirun", "help", "hydra_help", "resolve")
        if getattr(options, name)
    ]
    for name in ("cfg", "package", "info"):
        if (value := getattr(options, name)) is not None:
            flags += [f"--{name}", value]
    return flags


def _hydra_main(program: str, flags: list[str], options: argparse.Namespace, start: Callable[[Read], int]) -> int:
    """Let Hydra compose: each job of a sweep, or to print."""
    folders = [CONF] if options.config_dir is None else [CONF, options.config_dir]
    overrides = overrides_for_hydra(options.overrides, options.multirun, folders)
    if options.config_dir is not None:
        flags = [*flags, "--config-dir", str(options.config_dir)]
    register()
    sys.argv[1:] = [*flags, f"hydra.job.name={program}", *overrides]
    # Hydra then raises its errors, instead of printing them and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(configuration: DictConfig) -> None:
        check_files(HydraConfig.get().runtime.choices, folders)
        # Success raises no SystemExit, so that --multirun continues with the next job.
        if code := start(lambda: configuration):
            sys.exit(code)

    try:
        job()
    # By a job that failed, or by Hydra after --help.
    except SystemExit as ended:
        return int(ended.code or 0)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise ConfigError(explain(error)) from error
    return 0

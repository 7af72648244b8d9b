"""Compose the configuration from conf/ or a run folder, and overrides."""

import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from training.errors import ConfigError

from .keys import EXPERIMENT
from .load import explain, from_composed, load_run, register
from .overrides import CONF, Override, apply, check_option, override_of, read_overrides, unquoted
from .schema import Config
from .yaml_text import check_files


def compose(overrides: Sequence[str], base: Path | None = None, extra: Path | None = None) -> Config:
    """Return the checked configuration of these overrides, as typed on the command line.

    Without `base` they override conf/config.yaml. With `base`, a run folder, they override its config.yaml, and outputs and run_id
    are the folder's. `extra` is a folder of more options (--config-dir). Every error is a ConfigError that names the override.
    """
    return from_composed(composed(overrides, None if base is None else load_run(base), extra))


def composed(overrides: Sequence[str], base: DictConfig | None = None, extra: Path | None = None) -> DictConfig:
    """Return the configuration as compose() does, with values missing where nothing sets them. `base` stays as it is."""
    register()
    given = read_overrides(overrides)
    folders = [CONF] if extra is None else [CONF, extra]
    for override in given.groups:
        check_option(override, unquoted(override.text), folders)
    try:
        config = _from_conf(given.groups, extra) if base is None else _from_run(base, given.all, extra)
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(explain(error)) from error
    for override in given.values:
        apply(config, override)
    for note in given.notes:
        print(note, file=sys.stderr, flush=True)
    return config


def _from_conf(groups: Sequence[Override], extra: Path | None) -> DictConfig:
    choices = [
        "experiment=null" if _is_none(group) else override_of(group.key, unquoted(group.text)) for group in groups
    ]
    if extra is not None:
        choices.append(f"hydra.searchpath=[{override_of('', f'file://{extra.absolute()}')[1:]}]")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", choices, return_hydra_config=True)
    check_files(config.hydra.runtime.choices, [CONF] if extra is None else [CONF, extra])
    with open_dict(config):
        del config["hydra"]
    return config


def _is_none(override: Override) -> bool:
    return override.key == EXPERIMENT and override.text == "null"


def _from_run(base: DictConfig, overrides: Sequence[Override], extra: Path | None) -> DictConfig:
    """Return a run's configuration with the chosen options of groups.

    An option changes the keys that the files of its group set, as in any of them: evaluation=ten_crop leaves evaluation.batch to
    the run, and evaluation=validation undoes what another option of that group has set.
    """
    config = deepcopy(base)
    for override in overrides:
        if override.key in ("outputs", "run_id", EXPERIMENT):
            raise ConfigError(f"{override.typed}: the folder decides this. Fix: leave it out, or leave out --run")
        if override.is_group:
            option = _from_conf([override], extra)[override.key]
            for name in _names_set(override.key, extra):
                if not OmegaConf.is_missing(option, name):
                    config[override.key][name] = option[name]
    return config


def _names_set(group: str, extra: Path | None) -> list[str]:
    """List the keys that the files of a group set."""
    files = [file for folder in (CONF, extra) if folder is not None for file in (folder / group).glob("*.yaml")]
    return sorted({str(name) for file in files for name in OmegaConf.load(file)} - {"defaults"})

"""Refuse text that YAML reads as a number or a truth value, because it would change: run_id: 2024_01 is 202401 to YAML."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from training.errors import ConfigError

from .keys import EXPERIMENT, GROUPS, KEYS, NUMBER_OR_WORD, leaves, type_of


def check_files(choices: Mapping[str, Any], folders: Sequence[Path]) -> None:
    """Check the files of these options of groups, and those of the same group that they include."""
    for group, option in choices.items():
        if group in (*GROUPS, EXPERIMENT) and option is not None:
            _check_option(group, option, folders)


def _check_option(group: str, option: str, folders: Sequence[Path]) -> None:
    file = next((file for folder in folders if (file := folder / group / f"{option}.yaml").is_file()), None)
    # The schema is no file.
    if file is None:
        return
    loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    if not isinstance(loaded, dict):
        return
    for entry in loaded.pop("defaults", []):
        if isinstance(entry, str):
            _check_option(group, entry, folders)
    in_root = re.search(r"^# *@package +_global_", file.read_text(), re.MULTILINE) is not None
    check_text(loaded if in_root else {group: loaded}, str(file))


def check_text(loaded: DictConfig | dict[Any, Any], file: str) -> None:
    """Raise ConfigError for a key of type text whose value is none in the file as YAML reads it."""
    plain = OmegaConf.to_container(loaded, resolve=False) if isinstance(loaded, DictConfig) else loaded
    assert isinstance(plain, dict)
    for key, value in leaves(plain):
        if key in NUMBER_OR_WORD and type(value) is int:
            continue
        if key in KEYS and type_of(key) is str and value is not None and not isinstance(value, str):
            name = key.rpartition(".")[2]
            raise ConfigError(f'{file}: {key} is text, and YAML reads {value!r} there. Fix: quote it, {name}: "..."')

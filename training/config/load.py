"""Load a configuration: composed by Hydra or read from a run folder."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from runtime import run_layout
from training.errors import ConfigError

from .checks import check
from .keys import GROUPS, REMOVED_KEYS, RENAMED_KEYS, SECTIONS, fix_unknown
from .overrides import escaped
from .schema import Config
from .yaml_text import check_text


def register() -> None:
    """Register the schema with Hydra, so that composing refuses unknown keys."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group in GROUPS:
        store.store(group=group, name="schema", node=SECTIONS[group])


def from_composed(composed: Any) -> Config:
    """Convert what Hydra composed to the typed configuration. Raises ConfigError for a missing or invalid value."""
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(
                f"no value for {', '.join(missing)}. Fix: choose an experiment (experiment=smoke) or set {missing[0]}=..."
            )
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(config, Config)
    check(config)
    return config


def explain(error: BaseException) -> str:
    """Return the message for an error of Hydra, OmegaConf or the YAML reader: one line that ends with the fix."""
    # Hydra begins with the file that it was reading: In 'experiment/mine': ...
    file = re.match(r"In '(.+?)': ", str(error))
    cause = error
    while not isinstance(cause, OmegaConfBaseException) and (deeper := cause.__cause__ or cause.__context__):
        cause = deeper
    key = getattr(cause, "full_key", None)
    if isinstance(cause, OmegaConfBaseException) and key:
        where = f"{file[1]}.yaml: " if file else ""
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            return f"{where}there is no key {key!r}. {fix_unknown(key)}"
        return f"{where}{key}: {_line(cause)}. Fix: correct that value; training/config/schema/ describes each key"
    return f"{_line(error)}. Fix: correct that file; conf/ has examples"


def _line(error: BaseException) -> str:
    """Return an error's message in one line, without OmegaConf's types and Hydra's search path."""
    text = str(error).partition("Config search path")[0]
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(
        line for line in lines if line and not line.startswith(("full_key", "reference_type", "object_type"))
    )


def read_config(folder: Path) -> Config:
    """Read the configuration of a run folder. Raises ConfigError if it is missing or broken."""
    return from_composed(load_run(folder))


def load_run(folder: Path) -> DictConfig:
    """Read a run folder's config.yaml. Raises ConfigError if it is missing or broken."""
    path = folder / run_layout.CONFIG
    try:
        loaded = _with_new_keys(OmegaConf.load(path))
        config = OmegaConf.merge(OmegaConf.structured(Config), loaded)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}. Fix: --run FOLDER of a run that was started"
        ) from error
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    assert isinstance(config, DictConfig)
    check_text(loaded, str(path))
    OmegaConf.set_struct(config, True)
    # The folder may have been moved.
    config.outputs, config.run_id = escaped(str(folder.absolute().parent)), escaped(folder.absolute().name)
    return config


def as_yaml(config: Config) -> str:
    """Return the text of config.yaml. Like Hydra's files it may hold `${...}` only escaped, because reading interpolates."""

    def escape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: escape(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [escape(inner) for inner in value]
        return escaped(value) if isinstance(value, str) else value

    return OmegaConf.to_yaml(OmegaConf.create(escape(asdict(config))))


def _with_new_keys(loaded: Any) -> Any:
    """Rename and remove the keys of an older config.yaml, in place."""
    for removed in REMOVED_KEYS:
        group, key = removed.split(".")
        settings = loaded.get(group) if isinstance(loaded, DictConfig) else None
        if isinstance(settings, DictConfig):
            settings.pop(key, None)
    for old, new in RENAMED_KEYS.items():
        group, key = old.split(".")
        settings = loaded.get(group) if isinstance(loaded, DictConfig) else None
        if isinstance(settings, DictConfig) and key in settings:
            settings[new.split(".")[1]] = settings.pop(key)
    return loaded

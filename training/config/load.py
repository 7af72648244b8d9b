"""Load a configuration: composed by Hydra or read from a run folder."""

from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runtime import run_layout
from training.errors import ConfigError

from .checks import check
from .schema import (
    Config,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    LoggerConfig,
    ModelConfig,
    NumericsConfig,
    OptimizerConfig,
    PipelineConfig,
    ScheduleConfig,
)

RENAMED_KEYS = {
    "distributed.wire": "distributed.gradient_dtype",
    "distributed.hang_s": "distributed.hang_timeout_s",
}
"""Old and new names of renamed keys. Only `read_config` accepts the old ones, for run folders written before the renaming."""


def register() -> None:
    """Register the schema with Hydra, so that composing refuses unknown keys."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    groups = {
        "model": ModelConfig,
        "data": DataConfig,
        "pipeline": PipelineConfig,
        "optimizer": OptimizerConfig,
        "schedule": ScheduleConfig,
        "numerics": NumericsConfig,
        "distributed": DistributedConfig,
        "logger": LoggerConfig,
        "evaluation": EvaluationConfig,
    }
    for group, node in groups.items():
        store.store(group=group, name="schema", node=node)


def from_composed(composed: Any) -> Config:
    """Convert what Hydra composed to the typed configuration. Raises ConfigError for a missing or invalid value."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(
            f"no value for {', '.join(missing)}. Fix: choose an experiment (experiment=smoke) or set {missing[0]}=..."
        )
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))
    assert isinstance(config, Config)
    check(config)
    return config


def read_config(folder: Path) -> Config:
    """Read the configuration of a run folder. Raises ConfigError if it is missing or broken."""
    path = folder / run_layout.CONFIG
    try:
        config = from_composed(_with_new_keys(OmegaConf.load(path)))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}. Fix: --run FOLDER of a run that was started"
        ) from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is no configuration: {error}. Fix: start a new run with run_id=ANOTHER") from error
    # The folder may have been moved.
    config.outputs, config.run_id = str(folder.absolute().parent), folder.name
    return config


def _with_new_keys(loaded: Any) -> Any:
    """Rename the keys of an older config.yaml, in place."""
    for old, new in RENAMED_KEYS.items():
        group, key = old.split(".")
        settings = loaded.get(group) if isinstance(loaded, DictConfig) else None
        if isinstance(settings, DictConfig) and key in settings:
            settings[new.split(".")[1]] = settings.pop(key)
    return loaded

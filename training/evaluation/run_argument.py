"""Compose the configuration of `evaluate.py --run FOLDER [overrides]`: the run's own, with the overrides applied."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from training.config.compose import composed
from training.config.load import from_composed, load_run
from training.config.named_run import find_run
from training.config.schema import DistributedConfig
from training.errors import ConfigError

from .run_config import Kind, differences, flat


def config_of_run(
    overrides: Sequence[str],
    named: str,
    extra: Path | None = None,
    flag: str = "--run ",
    here: Mapping[str, Any] | None = None,
) -> DictConfig:
    """Return the configuration of the run that `named` leads to (find_run, with `flag`), with the overrides as typed.

    `here`: values by key that replace the run's before the overrides do, because this machine decides them. Raises ConfigError
    also for an override that only training would read.
    """
    folder, checkpoint = find_run(named, flag)
    base = load_run(folder)
    for key, value in (here or {}).items():
        OmegaConf.update(base, key, value)
    trained = flat(from_composed(base))
    # The launcher of this evaluation decides these.
    for field in fields(DistributedConfig):
        if field.name in ("backend", "controller", "world_size") or field.name.startswith("horovod_"):
            base.distributed[field.name] = field.default
    if checkpoint is not None:
        base.evaluation.checkpoint = checkpoint
    config = composed(overrides, base, extra)
    for each in differences(trained, from_composed(config), Kind.UNREAD):
        advice = f"; the precision of an evaluation is evaluation.amp={each.here}" if each.key == "numerics.amp" else ""
        raise ConfigError(
            f"{each}: only training reads {each.key}, so it would change nothing here. Fix: leave it out{advice}"
        )
    return config

"""Check the names that wandb gets: it refuses some when a run starts, the server others."""

from training.errors import ConfigError

from .schema import Config

# wandb.Settings refuses these, and wandb's documentation the rest of either list.
_NOT_IN_PROJECT = "/\\#?%:"
_NOT_IN_RUN_ID = "/\\#?%:;,'"

_MAX_NAME = 128
_MAX_TAG = 64


def check_wandb_names(config: Config) -> None:
    """Raise ConfigError for a name that wandb would refuse."""
    logger = config.logger
    for tag in logger.tags:
        if not 1 <= len(tag) <= _MAX_TAG:
            raise ConfigError(
                f"logger.tags must have 1 to {_MAX_TAG} characters each, got {logger.tags}. Fix: another tag for {tag!r}"
            )
    if logger.wandb == "disabled":
        return
    _check("logger.project", logger.project, _NOT_IN_PROJECT)
    if logger.group is not None:
        _check("logger.group", logger.group, "")
    # A new run's id begins with the experiment's name, which is also the default group.
    key, run_id = ("name", config.name) if config.run_id is None else ("run_id", config.run_id)
    _check(key, run_id, _NOT_IN_RUN_ID)


def _check(key: str, name: str, refused: str) -> None:
    found = sorted(set(name) & set(refused))
    if name.strip() != name or not name:
        problem = "it is empty, or begins or ends with a blank"
    elif len(name) > _MAX_NAME:
        problem = f"it has {len(name)} characters, and wandb accepts {_MAX_NAME}"
    elif found:
        problem = f"wandb accepts no {' '.join(found)} in it"
    elif not name.isprintable():
        problem = "it has control characters"
    else:
        return
    raise ConfigError(
        f"{key}={name!r} cannot be logged to wandb: {problem}. Fix: another {key}, or logger.wandb=disabled"
    )

"""Find the run folder that `--run FOLDER` or `predict.py FOLDER` names."""

from difflib import get_close_matches
from os.path import normpath
from pathlib import Path

from runtime import run_layout
from runtime.checkout import CHECKOUT
from training.errors import ConfigError


def find_run(named: str, flag: str = "--run ") -> tuple[Path, str | None]:
    """Return the run folder, and the checkpoint's name if `named` is one of the run's checkpoint folders.

    A relative path starts in the working directory or, if nothing is there, in the checkout. Raises ConfigError if the path
    does not lead to a run, and names runs that are near. `flag`: what stands before the folder on the command line.
    """
    try:
        return _find_run(named, flag)
    except OSError as error:
        raise ConfigError(
            f"{flag}{named}: {error.strerror}. Fix: {flag}outputs/NAME of a run that was started"
        ) from error


def _find_run(named: str, flag: str) -> tuple[Path, str | None]:
    # Links stay as they are: nodes may resolve them to different paths, and ranks must agree on their configuration.
    places = list(dict.fromkeys(Path(normpath(base / named)) for base in (Path.cwd(), CHECKOUT)))
    path = next((place for place in places if place.exists()), None)
    if path is None:
        told = " or ".join(map(str, places))
        raise ConfigError(f"{flag}{named}: there is no folder {told}. {_fix(places[-1], flag)}")
    checkpoint = None
    if path.parent.name == run_layout.CHECKPOINTS:
        path, checkpoint = path.parent.parent, path.name
    elif path.name in (run_layout.CHECKPOINTS, run_layout.CONFIG):
        path = path.parent
    if (path / run_layout.CONFIG).is_file():
        return path, checkpoint
    if checkpoint is not None:
        raise ConfigError(
            f"{flag}{named}: {path} has no {run_layout.CONFIG}, so this checkpoint is without its run. "
            f"Fix: {_without_config(named, path, flag)}"
        )
    raise ConfigError(f"{flag}{named}: {path} is no run folder, it has no {run_layout.CONFIG}. {_fix(path, flag)}")


def _without_config(named: str, path: Path, flag: str) -> str:
    if flag:
        return f"experiment=NAME model.init={named} with the overrides that it was trained with"
    return f"copy the run's {run_layout.CONFIG} to {path}"


def _fix(path: Path, flag: str) -> str:
    """Return advice that names a run: the one that holds the path, else the most alike beside it, else the newest."""
    for parent in path.parents:
        if (parent / run_layout.CONFIG).is_file():
            return f"Fix: {flag}{_short(parent)}"
    for folder in (path, path.parent, CHECKOUT / "outputs"):
        configs = list(folder.glob(f"*/{run_layout.CONFIG}")) if folder.is_dir() else []
        if configs:
            newest = max(configs, key=lambda config: config.stat().st_mtime).parent
            near = get_close_matches(path.name, [config.parent.name for config in configs], 1)
            return f"Fix: {flag}{_short(folder / near[0] if near else newest)}"
    return f"Fix: {flag}outputs/NAME of a run that was started"


def _short(path: Path) -> Path:
    return path.relative_to(CHECKOUT) if path.is_relative_to(CHECKOUT) else path

"""A run's folder: its configuration, where it came from, its records, checkpoints and success marker."""

import importlib.metadata
import platform
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distributed.topology import Topology

from .errors import ConfigError
from .schema import Config, from_composed
from .starts import note_start

_PACKAGES = (
    "torch",
    "torchvision",
    "horovod",
    "nvidia-dali-cuda130",
    "torchcodec",
    "av",
    "mpi4py",
    "numpy",
    "pyarrow",
    "wandb",
    "hydra-core",
)


class RunFolder:
    """Paths inside `outputs/<run_id>`; rank 0 writes there, other ranks only read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.bad_clips = path / "bad_clips.jsonl"
        self.bad_steps = path / "bad_steps.jsonl"
        self.report = path / "report.html"
        self.success = path / "SUCCESS"
        self.provenance = path / "provenance.json"
        self.outcome = path / "outcome.json"

    def create(self, config: Config, topology: Topology, hosts: list[str], first_step: int) -> None:
        """Make the folder and write what the run was started with; a resumed run adds to its provenance."""
        self.write_config(config)
        self.checkpoints.mkdir(exist_ok=True)
        note_start(self.provenance, self.outcome, provenance(topology, hosts) | {"first_step": first_step})

    def write_config(self, config: Config) -> None:
        """Make the folder if need be, and write what it was started with: whole or not at all, for a requeued job reads it."""
        aside = self.path / f".{self.config.name}.part"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            aside.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
            aside.replace(self.config)
        except OSError as error:
            raise ConfigError(
                f"cannot make the run folder {self.path}: {error.strerror}. Fix: outputs=FOLDER"
            ) from error


def read_config(folder: Path) -> Config:
    """The configuration that a run folder was made with. Raises ConfigError where there is none, or a broken one."""
    path = folder / "config.yaml"
    try:
        config = from_composed(OmegaConf.load(path))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}. Fix: --run FOLDER of a run that was started"
        ) from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{path} is no configuration: {error}. Fix: start the run anew, with run_id=ANOTHER"
        ) from error
    config.outputs, config.run_id = str(folder.absolute().parent), folder.name  # where it is now
    return config


def new_run_id(config: Config, topology: Topology) -> str:
    """What a run is called when nobody said: the launcher's job, so that a requeued job finds its folder, else the time."""
    return topology.job_id or f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"


def provenance(topology: Topology, hosts: list[str]) -> dict[str, Any]:
    """Which code, packages, launcher and hosts a start was made of."""
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "git_commit": git("rev-parse", "HEAD"),
        "git_diff": git("diff", "HEAD"),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "launcher": topology.launcher,
        "world_size": topology.size,
        "hosts": hosts,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """What git says of the checkout; None where there is no git, or a checkout that was copied without its history."""
    checkout = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

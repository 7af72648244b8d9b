"""The run folder: configuration, provenance, metrics, checkpoints and success marker."""

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from distributed.topology import Topology
from runtime import run_layout
from runtime.atomic_write import atomic_write, write_text
from runtime.checkout import CHECKOUT
from training.build.class_names import lines_of
from training.config.load import as_yaml
from training.config.schema import Config
from training.errors import ConfigError

from .restarts import record_start

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
    """Paths inside `outputs/<run_id>`. Rank 0 writes there, other ranks only read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / run_layout.CONFIG
        self.checkpoints = path / run_layout.CHECKPOINTS
        self.metrics = path / run_layout.METRICS
        self.bad_clips = path / run_layout.BAD_CLIPS
        self.bad_steps = path / run_layout.BAD_STEPS
        self.report = path / run_layout.REPORT
        self.stream = path / run_layout.STREAM
        self.success = path / run_layout.SUCCESS
        self.provenance = path / run_layout.PROVENANCE
        self.outcome = path / run_layout.OUTCOME
        self.lock = path / run_layout.LOCK
        self.tensorboard = path / run_layout.TENSORBOARD
        self.profile = path / run_layout.PROFILE

    def write_config(self, config: Config) -> None:
        """Make the folder if it is not there, and write config.yaml. Atomic, because a requeued job reads that file."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, as_yaml(config))
        except OSError as error:
            raise ConfigError(
                f"cannot create the run folder {self.path}: {error.strerror}. Fix: outputs=FOLDER"
            ) from error

    def write_classes(self, classes: Sequence[str]) -> None:
        """Write classes.txt, the name of each output, for users of the weights. Atomic."""
        with atomic_write(self.path / run_layout.CLASSES) as file:
            file.write(lines_of(classes))

    def record_start(self, start: dict[str, Any]) -> None:
        """Append this start (`provenance`) to provenance.json."""
        self.checkpoints.mkdir(exist_ok=True)
        record_start(self.provenance, self.outcome, start)


def new_run_id(name: str, topology: Topology) -> str:
    """Return the launcher's job id, so that a requeued job finds its folder; without one, name and time."""
    return topology.job_id or f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def provenance(topology: Topology, hosts: list[str], first_step: int) -> dict[str, Any]:
    """Describe code, packages, launcher, hosts and first step of a start."""
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
        "first_step": first_step,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """Run git in the checkout and return its output; None if there is no git, or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

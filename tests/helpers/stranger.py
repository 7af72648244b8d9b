"""Another user of this machine, who gets to a name in a shared folder first."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

STRANGER = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user's files need root")


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Make a folder that all users can reach and write to, like /tmp; pytest's own is private."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="shared-") as name:
        Path(name).chmod(0o1777)
        yield Path(name)


def as_stranger(script: str, *arguments: str | Path) -> None:
    """Run a shell script with another user id."""
    command = ["sh", "-euc", script, "sh", *map(str, arguments)]
    subprocess.run(command, check=True, user=STRANGER, group=STRANGER, extra_groups=[], umask=0, cwd="/")

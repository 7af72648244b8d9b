"""A small file system that fills up quickly."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(disk: Path, size: str) -> Iterator[Path]:
    """Mount a file system of this size (`100k`, `1m`) on a new folder; skip the test without permission to mount."""
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system can be mounted by root alone")
    try:
        yield disk
    finally:
        # Lazy, because a loaded tensor may still map one of its files.
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def resize(disk: Path, size: str) -> None:
    """Change the size of a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def make_read_only(folder: Path, read_only: bool = True) -> None:
    """Mount a folder on itself, read-only; or undo that."""
    if not read_only:
        subprocess.run(["umount", str(folder)], check=True)
        return
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)

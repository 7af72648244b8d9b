"""A folder that a command fills over several calls: all of them must make the same thing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.prepare.errors import DataSetError
from runtime.atomic_write import atomic_write
from runtime.file_lock import file_lock

_PLAN_NAME, _LOCK_NAME = "plan.json", "lock"


def claim(target: Path, records: Path, made_of: dict[str, Any]) -> None:
    """Make a new or empty folder, or one of the same plan, ours; `records`: the folder in it that keeps the plan.

    Raises DataSetError for a folder that holds something else, or the same of other data or with other options.
    """
    target.mkdir(parents=True, exist_ok=True)
    if not records.exists() and any(target.iterdir()):
        raise DataSetError(f"{target} is not empty, and not of this command. Fix: choose another folder with --to")
    records.mkdir(exist_ok=True)
    plan = records / _PLAN_NAME
    with locked(records):
        if not plan.exists():
            with atomic_write(plan) as file:
                file.write(json.dumps(made_of).encode())
        if json.loads(plan.read_text()) != made_of:
            raise DataSetError(
                f"{target} was made of other manifests, or with other options ({plan}). "
                "Fix: remove the folder, or choose another one with --to"
            )


@contextmanager
def locked(records: Path) -> Iterator[None]:
    """Let one process at a time work on the records."""
    with file_lock(records / _LOCK_NAME):
        yield

"""A folder that a command fills over several calls, all with the same inputs and options."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.prepare.errors import DataSetError
from runtime.atomic_write import write_text
from runtime.file_lock import file_lock

# The name of the first release: another one would refuse folders begun with it.
_INPUTS_NAME = "plan.json"
_LOCK_NAME = "lock"


def claim_folder(target: Path, records: Path, inputs: dict[str, Any]) -> None:
    """Take a new or empty folder, or one with the same inputs; `records` is the folder in it that keeps the inputs.

    Raises DataSetError for a folder with other content, inputs or options.
    """
    target.mkdir(parents=True, exist_ok=True)
    if not records.exists() and any(target.iterdir()):
        raise DataSetError(
            f"{target} is not empty, and was not made by this command. Fix: choose another folder with --to"
        )
    records.mkdir(exist_ok=True)
    path = records / _INPUTS_NAME
    with records_lock(records):
        if not path.exists():
            write_text(path, json.dumps(inputs))
        if json.loads(path.read_text()) != inputs:
            raise DataSetError(
                f"{target} was made from other manifests or with other options ({path}). "
                "Fix: remove the folder, or choose another one with --to"
            )


@contextmanager
def records_lock(records: Path) -> Iterator[None]:
    """Let one process at a time work on the records."""
    with file_lock(records / _LOCK_NAME):
        yield

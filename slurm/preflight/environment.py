"""Check what the ranks of this node will inherit, and the run folder: the same checks as at the start of a rank."""

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

from runtime.environment import EnvironmentFault, repair, shared_memory_bytes

_NOTES, _NOTE_CHARACTERS = 4, 180


def check_environment(run_folder: Path | None, writes: bool) -> dict[str, Any]:
    """Return shared memory in MiB and notes on what ranks repair by themselves. `writes`: rank 0, which writes the run folder.

    Raises EnvironmentFault with the fix.
    """
    notes = repair()
    if run_folder is not None:
        notes += try_folder(run_folder, writes)
    total, free = shared_memory_bytes()
    shared = {"shared_mib": total / 2**20, "shared_free_mib": free / 2**20}
    # A report longer than 1,024 bytes could be mixed with another task's.
    return shared | {"notes": [note[:_NOTE_CHARACTERS] for note in notes[:_NOTES]]}


def try_folder(folder: Path, writes: bool) -> list[str]:
    """Check that this node sees a run folder, and, if it writes there, that files and locks work; returns notes."""
    try:
        next(folder.iterdir(), None)
        if not writes:
            return []
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                return [f"{folder} is on a file system without locks ({error.strerror}); lease files are used"]
    except OSError as error:
        raise EnvironmentFault(
            f"run folder {folder}: {error.strerror}. Fix: outputs=FOLDER on a file system that all nodes mount, with free space"
        ) from error
    return []

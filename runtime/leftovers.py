"""Remove what a killed process (SIGKILL) did not: its temporary folder, its semaphores in shared memory.

A process holds a lock on a file in its temporary folder, which the kernel releases when it ends. So the next start knows which
folders belong to nobody. The semaphores of multiprocessing, whose names are random otherwise, are named after the folder.
"""

import fcntl
import glob
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from .private_folder import check_private

_OWNER = "owner"
_SHARED_MEMORY = Path("/dev/shm")


def make_temporary_folder(prefix: str) -> tuple[Path, int]:
    """Make a private temporary folder; return it and a descriptor: while that is open in any process, the folder is in use."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    return folder, _hold(folder)


def hold_socket_folder() -> None:
    """Mark the folder of multiprocessing's sockets as in use by this process, and name its semaphores after the folder.

    Call it before the first semaphore is made. Processes that multiprocessing starts from here use both too. Also removes such
    folders of killed processes.
    """
    # Late, because they take long to import.
    import multiprocessing.process
    import multiprocessing.util

    folder = Path(multiprocessing.util.get_temp_dir())
    if not (folder / _OWNER).exists():
        # Open until this process ends.
        _hold(folder)
        multiprocessing.process.current_process()._config["semprefix"] = f"/{folder.name}"  # type: ignore[attr-defined]
    remove_leftovers(folder.parent, "pymp-")


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove this user's folders of that prefix which no process holds any more, and their semaphores. Never raises OSError."""
    for owner in parent.glob(f"{glob.escape(prefix)}*/{_OWNER}"):
        with suppress(OSError):
            _remove_if_unused(owner)


def _hold(folder: Path) -> int:
    """Lock the owner file in a folder. It gets its name once it is locked, so that nobody finds it unlocked."""
    made = folder / f".{_OWNER}"
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    # Some network file systems have no locks: then the folder is nobody's, and stays when this process is killed.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.rename(folder / _OWNER)
    return descriptor


def _remove_if_unused(owner: Path) -> None:
    folder = owner.parent
    check_private(folder)
    descriptor = os.open(owner, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for semaphore in _SHARED_MEMORY.glob(f"sem.{glob.escape(folder.name)}-*"):
            if semaphore.lstat().st_uid == os.geteuid():
                semaphore.unlink()
        shutil.rmtree(folder)
    finally:
        os.close(descriptor)

"""The private folder of this user on a node, for logs and caches: `tsm-USER` in the temporary folder.

Temporary folders are shared. Another user may have made a folder, a link or a FIFO of that name, so that we write to a file
of the other user's choice, load code from there, or wait forever. Only a folder that nobody else can change is used.
"""

import errno
import getpass
import glob
import os
import pwd
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def private_folder() -> tuple[Path, str | None]:
    """Return the folder, made when missing, and a note if it is not `tsm-USER`. Raises OSError.

    While another user has a `tsm-USER`, it is `tsm-USER.RANDOM`, which later processes of this user find again.
    """
    usual = usual_folder()
    with suppress(FileExistsError):
        usual.mkdir(mode=0o700)
    try:
        check_private(usual)
        return usual, None
    except OSError as error:
        found = private_folders()
        folder = found[0] if found else _make_another(usual)
        return (
            folder,
            f"{usual} {error.strerror}; {folder} is used. Fix: remove the former, or ask its owner or root to",
        )


def private_folders() -> list[Path]:
    """List this user's private folders that exist, the usual one first."""
    usual = usual_folder()
    names = [usual, *sorted(usual.parent.glob(f"{glob.escape(usual.name)}.*"))]
    return [folder for folder in names if _is_private(folder)]


def usual_folder() -> Path:
    """Return where the private folder is, unless another user has taken the name."""
    return Path(tempfile.gettempdir()) / f"tsm-{getpass.getuser()}"


def check_private(folder: Path) -> os.stat_result:
    """Return the status of a folder that only this user can write to. Raises PermissionError, whose strerror says what it is."""
    found = folder.lstat()
    if found.st_uid != os.geteuid():
        fault = f"belongs to {_user_name(found.st_uid)}"
    elif stat.S_ISLNK(found.st_mode):
        fault = "is a symbolic link"
    elif not stat.S_ISDIR(found.st_mode):
        fault = "is not a folder"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault = f"can be changed by other users (mode {stat.S_IMODE(found.st_mode):o})"
    else:
        return found
    raise PermissionError(errno.EPERM, fault, str(folder))


def can_be_replaced(folder: Path) -> bool:
    """Return whether other users can replace files and folders in `folder`, also those of another owner."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def open_private_file(path: str, flags: int) -> int:
    """Open `PRIVATE_FOLDER/FOLDER/NAME`, made when missing together with FOLDER; an opener for `open`. Raises OSError."""
    name, folder = Path(path).name, Path(path).parent
    checked = check_private(folder.parent)
    private = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # Where others can rename it, it may have been replaced since.
        if not os.path.samestat(checked, os.fstat(private)):
            raise PermissionError(errno.EPERM, "was replaced by another user", str(folder.parent))
        os.fchmod(private, 0o700)
        with suppress(FileExistsError):
            os.mkdir(folder.name, 0o700, dir_fd=private)
        # Of a FIFO, O_NONBLOCK makes an error.
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(f"{folder.name}/{name}", flags, 0o600, dir_fd=private)
    finally:
        os.close(private)


def _make_another(usual: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{usual.name}.", dir=usual.parent))
    try:
        check_private(folder)
    except OSError:
        # Some network file systems give what root makes another owner.
        folder.rmdir()
        raise
    return folder


def _is_private(folder: Path) -> bool:
    try:
        check_private(folder)
    except OSError:
        return False
    return True


def _user_name(uid: int) -> str:
    with suppress(KeyError):
        return f"{pwd.getpwuid(uid).pw_name} (user id {uid})"
    return f"user id {uid}"

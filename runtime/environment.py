"""Checks and repairs of what a process inherits: locale, user name, home, temporary folder, limits, shared memory.

Containers, batch systems and login scripts leave these in states that Python and libraries answer with a traceback, or with
a hang. A repair is returned as a note to print; what cannot be repaired raises EnvironmentFault. Imports no package.
"""

import errno
import getpass
import os
import resource
import sys
import tempfile
import traceback
from pathlib import Path

from .private_folder import can_be_replaced, private_folder

SHARED_MEMORY = "/dev/shm"

# An address of a Unix socket has 107 bytes. multiprocessing appends /pymp-XXXXXXXX/listener-XXXXXXXX to the temporary folder.
_SOCKET_FOLDER_BYTES = 107 - len("/pymp-XXXXXXXX/listener-XXXXXXXX")
_SHORT_FOLDERS = ("/tmp", "/var/tmp", SHARED_MEMORY)


_FIXES = {
    errno.ENOSPC: "free some space there, or choose another folder",
    errno.EDQUOT: "free some of your quota there, or choose another folder",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose another folder, or let its owner give you access",
    errno.EPERM: "choose another folder, or let its owner give you access",
    errno.EFBIG: "ulimit -f unlimited",
    errno.EMFILE: "ulimit -n 4096, or fewer pipeline.workers",
    errno.ENFILE: "fewer processes on this machine",
    errno.EAGAIN: "ulimit -u unlimited or a higher docker --pids-limit, or fewer pipeline.workers",
    errno.ENOMEM: "more memory for the job, or fewer pipeline.workers",
    errno.ENOSYS: "choose a folder on another file system",
}
"""Of errors of the kernel that say something about the machine, and nothing about the program."""


class EnvironmentFault(RuntimeError):
    """Something that this process inherited makes the work impossible. The text ends with the fix."""


def start_program() -> None:
    """Make text and the working folder usable; the first call of an entry point, before it imports anything large.

    Starts the program again in Python's UTF-8 mode if the locale has another encoding: names of classes, files and runs need
    all characters, and so do workers, which inherit the mode. Ends the program if its working folder was deleted.
    """
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode and not sys.flags.ignore_environment:
        os.environ["PYTHONUTF8"] = "1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # PYTHONIOENCODING may still ask for ASCII, and a file name may hold bytes that are no UTF-8.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        Path.cwd()
    except OSError as error:
        print(
            f"error (start-up): the working folder is gone: {error.strerror}. Fix: cd to one that exists",
            file=sys.stderr,
        )
        sys.exit(2)


def repair() -> list[str]:
    """Repair what can be repaired for this process and its children; returns notes. Raises EnvironmentFault."""
    # First, because the others use them.
    notes = [*_find_temporary_folder(), *_name_user()]
    return [*notes, *_shorten_socket_folder(), *_place_caches()]


def _find_temporary_folder() -> list[str]:
    """Let Python choose the temporary folder: the first of TMPDIR, /tmp and others in which it can write a file."""
    wanted = next((value for name in ("TMPDIR", "TEMP", "TMP") if (value := os.environ.get(name))), None)
    try:
        chosen = tempfile.gettempdir()
    except OSError as error:
        raise EnvironmentFault(
            f"no temporary folder can be written to: {error.strerror}. Fix: TMPDIR=FOLDER with some free space"
        ) from error
    if wanted is None or Path(wanted).resolve() == Path(chosen).resolve():
        return []
    # Libraries written in C read the variable too.
    os.environ["TMPDIR"] = chosen
    return [f"environment: TMPDIR={wanted} is no folder that can be written to; {chosen} is used"]


def _name_user() -> list[str]:
    """Give a user without an entry in the password database a name: torch, wandb and others ask for one."""
    try:
        getpass.getuser()
    # KeyError up to Python 3.12.
    except (OSError, KeyError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
        return [
            f"environment: user id {os.getuid()} has no name on this machine; LOGNAME={os.environ['LOGNAME']} is used"
        ]
    return []


def _shorten_socket_folder() -> list[str]:
    """Make multiprocessing keep its sockets in a short private folder, if the temporary folder is too long for an address."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) <= _SOCKET_FOLDER_BYTES:
        return []
    # Late, because it takes longer to import than all the rest here.
    import multiprocessing.util

    for short in _SHORT_FOLDERS:
        tempfile.tempdir = short
        try:
            # Makes a folder of mode 700, which multiprocessing and its children use from now on and which it removes at exit.
            made = multiprocessing.util.get_temp_dir()
            return [f"environment: TMPDIR is too long for addresses of sockets ({folder}); they are in {made}"]
        except OSError:
            continue
        finally:
            tempfile.tempdir = folder
    raise EnvironmentFault(
        f"TMPDIR has {len(os.fsencode(folder))} bytes, and sockets need a folder of at most {_SOCKET_FOLDER_BYTES}: {folder}. "
        "Fix: TMPDIR=/tmp, or another short folder"
    )


def _place_caches() -> list[str]:
    """Keep caches of compiled kernels on the node if the home folder cannot be written to, or in a Slurm job.

    Those of a Slurm job would otherwise write the home folder on all nodes at once.
    """
    try:
        home = Path.home()
    except RuntimeError:
        # No HOME, and no entry in the password database.
        folder, notes = _folder_for_code()
        os.environ["HOME"] = str(folder)
        return [f"environment: this user has no home folder; HOME={folder} is used", *notes]
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        folder, notes = _folder_for_code()
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
        return [f"environment: the home folder {home} cannot be written to; caches are in {folder}", *notes]
    if "TSM_LOCAL_DISK" not in os.environ or "TRITON_CACHE_DIR" in os.environ:
        return []
    try:
        folder, notes = _folder_for_code()
    except EnvironmentFault as error:
        return [f"environment: Triton's cache stays in the home folder: {error}"]
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    return notes


def _folder_for_code() -> tuple[Path, list[str]]:
    """Return the private folder, for files that are executed, and notes. Raises EnvironmentFault where others could replace it."""
    temporary = Path(tempfile.gettempdir())
    if can_be_replaced(temporary):
        raise EnvironmentFault(
            f"other users can replace folders in {temporary} (no sticky bit). "
            f"Fix: chmod +t {temporary}, or TMPDIR=FOLDER (TSM_LOCAL_DISK in Slurm jobs) that only you can write to"
        )
    folder, note = private_folder()
    return folder, [f"environment: {note}"] if note else []


def explain(error: Exception) -> str | None:
    """Return what is wrong with the machine, where, and the fix; None for an error that may be the program's own."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        number = errno.EAGAIN
    if number not in _FIXES:
        return None
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({Path(frame[0].filename).name}:{frame[0].lineno})" if frame else ""
    return f"{error}{where}. Fix: {_FIXES[number]}"


def allow_open_files(wanted: int, least: int, use: str, otherwise: str = "") -> None:
    """Raise the limit of open files to `wanted`, as far as it may be. Raises EnvironmentFault below `least`.

    `use`: what needs them, for the message; `otherwise`: another fix than a higher limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < least:
        raise EnvironmentFault(
            f"a process may open {soft} files, and needs {least} {use}. Fix: ulimit -n {wanted}{otherwise}"
        )


def raise_limits() -> list[str]:
    """Raise the limits of processes and of a file's size as far as they may be; returns a note if the latter remains."""
    for limit in (resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return []
    return [
        f"environment: no file may be larger than {hard / 2**20:.1f} MiB, and a larger checkpoint cannot be written. "
        "Fix: ulimit -f unlimited"
    ]


def shared_memory_bytes() -> tuple[int, int]:
    """Return the size of the file system of shared memory, and what is free of it. Raises OSError where there is none."""
    found = os.statvfs(SHARED_MEMORY)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize

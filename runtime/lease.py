"""Lease files: locks on file systems without flock. The file names its holder, who renews its modification time.

A lease is stale when its holder, on this machine, is gone, or when a holder on another machine has not renewed it for a minute
of this process's watching: no clocks of two machines are compared.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

LEASE_SUFFIX = ".lease"

_RENEWED_EVERY_S = 5.0
STALE_AFTER_S = 60.0
_POLL_S = 0.5


class LockHeld(Exception):
    """Another process holds the lock; `holder` says which, for a message, and `job` is the id of its batch job, if any."""

    def __init__(self, holder: str, job: str | None = None) -> None:
        super().__init__(f"in use by {holder}")
        self.holder, self.job = holder, job


def identity(job: str | None = None) -> str:
    """Return who this process is, as a line of JSON; `token` differs at each call."""
    pid = os.getpid()
    fields = {
        "host": socket.gethostname(),
        "pid": pid,
        "machine": _machine(),
        "started": _start_ticks(pid),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "job": job,
        "token": secrets.token_hex(8),
    }
    return json.dumps(fields) + "\n"


def describe(text: str) -> str:
    """Describe the holder whose identity this is."""
    fields = _parse(text)
    if "pid" not in fields:
        return "an unknown process"
    job = f" (job {fields['job']})" if fields.get("job") else ""
    return f"process {fields['pid']} on {fields.get('host')} since {fields.get('since')}{job}"


def take_lease(
    path: Path,
    wait: bool = False,
    job: str | None = None,
    watching: Callable[[str], None] = lambda holder: None,
    taken_over: Callable[[str], None] = lambda holder: None,
    lost: Callable[[str], None] = lambda holder: None,
) -> Callable[[], None]:
    """Create the lease file, or take over a stale one, and renew it from a thread; returns the function that releases it.

    Raises LockHeld while another process holds it, unless `wait`. `job`: id of this process' batch job, for messages.
    `watching` is called again and again while a holder on another machine is watched, `taken_over` once a stale lease has been
    taken over, and `lost`, from the thread, when another process took this one over: it was not renewed for a minute.
    """
    ours = identity(job)
    while not _create(path, ours):
        found = _read(path)
        if found is not None and _is_stale(path, *found, watching):
            try:
                if _take_over(path, found[0], ours):
                    taken_over(describe(found[0]))
                    break
            # By the process that is taking it over.
            except LockHeld:
                if not wait:
                    raise
        elif not wait and (found := _read(path)) is not None:
            raise LockHeld(describe(found[0]), _parse(found[0]).get("job"))
        time.sleep(_POLL_S)
    ended = threading.Event()
    threading.Thread(target=_renew, args=(path, ours, ended, lost), name=f"lease {path.name}", daemon=True).start()

    def release() -> None:
        ended.set()
        found = _read(path)
        if found is not None and found[0] == ours:
            path.unlink(missing_ok=True)

    return release


def other_holder(path: Path, ours: str) -> str | None:
    """Describe the process that has taken over a lease with the text `ours`; None if none has, or the file cannot be read."""
    with suppress(OSError):
        found = _read(path)
        if found is not None and found[0] != ours:
            return describe(found[0])
    return None


def holder_is_gone(text: str) -> bool | None:
    """Return whether the process with this identity has ended; None if it ran on another machine, or the text is damaged."""
    fields = _parse(text)
    if fields.get("machine") != _machine():
        return None
    return bool(_start_ticks(fields["pid"]) != fields["started"])


def _create(path: Path, text: str) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        # A full disk.
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> tuple[str, int] | None:
    """Return a lease's text and modification time; None if there is none."""
    try:
        # Opening a file makes NFS ask the server for its current time, which stat(2) may take from a cache.
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _take_over(path: Path, stale: str, ours: str) -> bool:
    """Replace a stale lease, unless another process did so first. Raises LockHeld while one is doing it."""
    release = take_lease(path.with_name(path.name + ".takeover"))
    try:
        found = _read(path)
        if found is None or found[0] != stale:
            return False
        replacement = path.with_name(path.name + ".new")
        replacement.write_text(ours, encoding="utf-8")
        os.replace(replacement, path)
        return True
    finally:
        release()


def _renew(path: Path, ours: str, ended: threading.Event, lost: Callable[[str], None] = lambda holder: None) -> None:
    """Renew the lease until it is released, or another process took it over."""
    while not ended.wait(_RENEWED_EVERY_S):
        # The file system may fail for a while, or its mount be away.
        with suppress(OSError):
            found = _read(path)
            if found is None:
                continue
            if found[0] != ours:
                lost(describe(found[0]))
                return
            os.utime(path)


def _is_stale(path: Path, text: str, mtime_ns: int, watching: Callable[[str], None]) -> bool:
    """Tell whether a lease's holder is gone. A holder on another machine is watched until it renews the lease."""
    fields = _parse(text)
    if fields.get("machine") == _machine():
        return _start_ticks(fields["pid"]) != fields["started"]
    end_s = time.monotonic() + STALE_AFTER_S
    while time.monotonic() < end_s:
        watching(describe(text))
        time.sleep(_POLL_S)
        if _read(path) != (text, mtime_ns):
            return False
    return True


def _parse(text: str) -> dict:
    """Return the fields of an identity; none of a file that is damaged, or was created a moment ago and is still empty."""
    try:
        fields = json.loads(text)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) and {"machine", "pid", "started"} <= fields.keys() else {}


@cache
def _machine() -> str:
    """Return what makes pids comparable: the boot of this machine, and the pid namespace of a container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _start_ticks(pid: int) -> int | None:
    """Return when a process started, in ticks since boot; None if it is gone. A pid alone may be used again."""
    try:
        # The name, in parentheses, may contain blanks.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])

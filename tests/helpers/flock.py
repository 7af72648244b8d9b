"""File systems without flock(2)."""

import errno
import fcntl
import os

import pytest


def break_flock(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> None:
    """Make flock fail in this process, as Lustre mounted without `-o flock` does (ENOSYS)."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)

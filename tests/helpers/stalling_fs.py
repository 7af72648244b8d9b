"""A read-only view of a folder whose reads can block or slow down, as with a lost or slow file server.

Reads block for as long as an empty marker file exists. A marker that contains a number delays each opening of a file by
so many seconds instead.

`python tests/helpers/stalling_fs.py FOLDER MOUNT MARKER` serves it until it is unmounted.
"""

import errno
import os
import sys
import time
from pathlib import Path

import mfusepy


class StallingFiles(mfusepy.Operations):
    """A FUSE file system over `folder`; an empty `marker` blocks `read`, and a number in it delays `open`."""

    use_ns = True

    def __init__(self, folder: Path, marker: Path) -> None:
        self._folder, self._marker = folder, marker

    def _path(self, path: str) -> Path:
        return self._folder / path.lstrip("/")

    def getattr(self, path: str, fh: int | None = None) -> dict[str, object]:
        try:
            status = self._path(path).lstat()
        except FileNotFoundError:
            raise mfusepy.FuseOSError(errno.ENOENT) from None
        return {name: getattr(status, name) for name in ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *(entry.name for entry in self._path(path).iterdir())]

    def open(self, path: str, flags: int) -> int:
        time.sleep(self._delay_s() or 0.0)
        return os.open(self._path(path), os.O_RDONLY)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        while self._delay_s() is None:
            time.sleep(0.05)
        return os.pread(fh, size, offset)

    def _delay_s(self) -> float | None:
        """Return the delay of the marker, 0 without a marker, and None to block until the marker changes."""
        try:
            text = self._marker.read_text()
        except FileNotFoundError:
            return 0.0
        return float(text) if text else None

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0


if __name__ == "__main__":
    folder, mount, marker = map(Path, sys.argv[1:])
    # direct_io disables the page cache, so that every read reaches this process.
    mfusepy.FUSE(StallingFiles(folder, marker), str(mount), foreground=True, direct_io=True, ro=True)

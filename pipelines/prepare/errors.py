"""The error that prepare.py reports for a data set it cannot prepare."""

import errno
from pathlib import Path


class DataSetError(ValueError):
    """Unusable annotations, videos or options; the message names the file and line, and the fix."""


def cannot_write(path: Path | str, error: OSError, option: str) -> str:
    """Describe a failed write and its fix; `option` chooses the folder on the command line."""
    fix = f"choose another folder with {option}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = f"free space there and run the same command again, which resumes where it stopped, or {fix}"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = f"make it writable, or {fix}"
    return f"cannot write {path}: {error.strerror or error}. Fix: {fix}"

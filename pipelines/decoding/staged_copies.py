"""Staged files: copies of a data set's files on node-local disk, made by `prepare.py stage`, each under its absolute path.

All ranks read the one shared manifest, whichever files their nodes have staged. Any file may lack a staged copy.
"""

import os
import sys
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from pipelines.errors import BadClip
from pipelines.manifest import ManifestRow, image_file, in_shard

VARIABLE = "TSM_STAGED_FILES"
"""The environment variable that names the folder of the staged files."""

_given_up: set[Path] = set()


class Candidate:
    """A path to read a clip from. As a context manager it yields the path, and suppresses BadClip if another path follows:

    for candidate in candidates(root, row):
        with candidate as path:
            return read(path)
    raise NoCandidateError
    """

    reason = ""
    """The text of the suppressed error. The error itself holds its frames, and with them the batch being read, until the cyclic
    garbage collector runs."""

    def __init__(self, path: Path, is_staged: bool = False, staged: "Candidate | None" = None) -> None:
        self.path = path
        self._is_staged = is_staged
        self._staged = staged
        """The bad staged copy that this path replaces."""

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, BadClip) and self._is_staged:
            self.reason = str(error)
            return True
        # Only a good shared file proves that the staged copy is to blame.
        if error is None and self._staged is not None:
            _give_up(self._staged.path, f"{self._staged.reason}; reading {self.path}")
        return False


class NoCandidateError(AssertionError):
    """The error of the last candidate was suppressed: a fault of the program."""


def candidates(root: Path, row: ManifestRow) -> list[Candidate]:
    """List the paths to try for a row's clip: its staged copy, if there is one, then the shared file."""
    path = root / row.path
    copy = find_copy(root, row)
    if copy is None:
        return [Candidate(path)]
    staged = Candidate(copy, is_staged=True)
    return [staged, Candidate(path, staged=staged)]


def find_copy(root: Path, row: ManifestRow) -> Path | None:
    """Find the staged copy of a row's path; None if there is no complete one."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    copy = copy_path(Path(folder), root, row.path)
    in_files = row.is_images and not in_shard(row)
    last = image_file(copy, row, row.num_images - 1) if in_files else copy
    return copy if copy not in _given_up and last.exists() else None


def copy_path(folder: Path, root: Path, path: str) -> Path:
    """Compute where a file's staged copy is; `root`: the manifest's folder, `path`: the path in a manifest row."""
    return folder / os.path.normpath(_resolved(root) / path).lstrip(os.sep)


@lru_cache(maxsize=16)
def _resolved(root: Path) -> Path:
    return root.resolve()


def _give_up(copy: Path, why: str) -> None:
    """Stop using a staged copy in this process, and log it."""
    _given_up.add(copy)
    print(f"staged file is bad: {why}", file=sys.stderr, flush=True)

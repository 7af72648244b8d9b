"""The task of making a new form of one clip, which gets its final name once it is whole and checked."""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import BadClip
from pipelines.manifest import ManifestRow
from pipelines.prepare.errors import cannot_write
from runtime.atomic_write import TEMPORARY_SUFFIX, atomic_write

from .open_manifests import open_cached


@dataclass(frozen=True)
class Outcome:
    """The result of one task: the row of the new clip, or one of the texts."""

    row: ManifestRow | None = None
    bad: str = ""
    """The reason for leaving the clip out."""
    fatal: str = ""
    """The reason why the target cannot be written."""


@dataclass(frozen=True)
class ClipTask(ABC):
    """Row `number` of a manifest, and the place of its new clip."""

    manifest: Path
    number: int
    target: Path
    """Folder of the new data set."""
    stem: str
    """Path of the new clip below `target`, without a suffix."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The new clip: a file or a folder."""

    @abstractmethod
    def find_row(self, source: ManifestRow) -> ManifestRow | None:
        """Return the row of the finished clip, or None."""

    @abstractmethod
    def write(self, root: Path, source: ManifestRow) -> None:
        """Make the clip, check it, and give it its name. Raises BadClip if it must be left out."""

    def find_reason(self) -> str | None:
        """Return the recorded reason why the clip was left out, or None."""
        try:
            return self._reason_path.read_text()
        except OSError:
            return None

    @property
    def _reason_path(self) -> Path:
        return self.target / f"{self.stem}.bad"


def make_clip(task: ClipTask) -> Outcome:
    """Make a clip; record the reason if it is bad."""
    manifest = open_cached(task.manifest)
    source = manifest.row(task.number)
    try:
        task.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            task.write(manifest.root, source)
        except BadClip as error:
            # A file that cannot be read now may be there for the next call.
            if not isinstance(error.__cause__, OSError):
                with atomic_write(task._reason_path) as file:
                    file.write(str(error).encode(errors="surrogateescape"))
            return Outcome(bad=str(error))
        row = task.find_row(source)
        return Outcome(row) if row is not None else Outcome(bad=f"{task.path}: files are missing or empty")
    except OSError as error:
        return Outcome(fatal=cannot_write(task.path, error, "--to"))


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that gets the name `path` when the block ends; after an exception it is removed."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        # After a power loss, a folder of empty files may have the name.
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

"""Checkpoint folders: written atomically and durably, verified by checksums when read.

Loading never executes code: weights and optimizer state are safetensors, everything else is JSON.

A kill at any byte leaves a whole checkpoint: the one being written or the one before it. Folders whose names end in `.part`
belong to a write, replacement or removal that did not finish; the next write removes them.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from runtime.atomic_write import sync_folder

from .host_snapshot import HostSnapshot

BEST = "best"
"""The name of the link, next to the checkpoints, to the one with the best score."""

_PART_SUFFIX = ".part"
_NAME = re.compile(r"step-(\d{8})")
_REPLACED = re.compile(rf"\.step-(\d{{8}})\.replaced{re.escape(_PART_SUFFIX)}")
_CHECKSUMS = "sha256.json"
STATE_FILE = "state.json"

# Errors of a file that is not there. All others are the file system's.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)

CHUNK_BYTES = 4 << 20
"""Size of a write to the file system."""


class CheckpointError(RuntimeError):
    """An error in writing, reading or using a checkpoint."""


class UnreadableError(CheckpointError):
    """The file system fails to read a checkpoint, which may be whole."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of `network` and `optimizer` by name; `state` is plain JSON with at least `step`, the number of steps taken."""

    network: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class Snapshot:
    """A copy of a checkpoint's files in host memory; the next `take` reuses the memory."""

    def __init__(self) -> None:
        self.step = -1
        self._network, self._optimizer, self._state = HostSnapshot(), HostSnapshot(), b""

    def take(self, checkpoint: Checkpoint) -> Self:
        """Copy a checkpoint; its tensors may change when this returns."""
        self.step = checkpoint.state["step"]
        self._network.take(checkpoint.network)
        self._optimizer.take(checkpoint.optimizer)
        self._state = json.dumps(checkpoint.state, indent=1).encode()
        return self

    def files(self) -> dict[str, list[memoryview]]:
        """Return the bytes of each file, in parts."""
        return {
            "network.safetensors": self._network.parts(),
            "optimizer.safetensors": self._optimizer.parts(),
            STATE_FILE: [memoryview(self._state)],
        }


def write_snapshot(
    folder: Path, snapshot: Snapshot, keep: int, best: bool = False, check: Callable[[], object] = lambda: None
) -> Path:
    """Write `folder/step-XXXXXXXX`, then remove all checkpoints up to it but the `keep` newest and the best. One process calls it.

    `best`: point the link `best` to it. Checkpoints of later steps stay: the run restarted from an earlier step because it
    could not read them. The folder must exist: if its file system was unmounted, a new folder would hide the checkpoints.
    `check` is called before the folder is changed, and again before the checkpoint is put in place; it may raise.

    Raises CheckpointError, with the reason, when it cannot be written; an earlier checkpoint is then still there.
    """
    final = folder / f"step-{snapshot.step:08d}"
    temporary = _part(folder, final.name)
    check()
    try:
        _remove_parts(folder)
        temporary.mkdir()
        digests = {name: _write_file(temporary / name, parts) for name, parts in snapshot.files().items()}
        _write_file(temporary / _CHECKSUMS, [memoryview(json.dumps(digests, indent=1).encode())])
        sync_folder(temporary)
        # Writing takes most of the time, so most likely a job is suspended here.
        check()
        _put_in_place(temporary, final)
        if best:
            _link_best(folder, final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write {final}: {error}") from error
    # If the folder disappeared after the write, this checkpoint was written all the same, and the next write raises.
    with suppress(OSError):
        _remove_old(folder, snapshot.step, keep)
    return final


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest whole checkpoint, or None, and a line for each broken one that was skipped.

    Raises UnreadableError when none could be read and not all are broken, as on a file server that is away.
    """
    broken: list[str] = []
    unreadable: UnreadableError | None = None
    try:
        paths = sorted([*_by_step(folder, _REPLACED), *_by_step(folder, _NAME)], reverse=True)
    except OSError as error:
        raise UnreadableError(f"{folder} cannot be read: {error.strerror}") from error
    for _, path in paths:
        try:
            return load_checkpoint(path), broken
        except CheckpointError as error:
            broken.append(str(error))
            if isinstance(error, UnreadableError):
                unreadable = unreadable or error
    if unreadable is not None:
        raise unreadable
    return None, broken


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises CheckpointError when a file is missing or fails its checksum; UnreadableError when the file system fails.
    """
    try:
        digests: dict[str, str] = json.loads((path / _CHECKSUMS).read_text())
        for name, digest in digests.items():
            if _sha256(path / name) != digest:
                raise CheckpointError(f"{path / name} is damaged: its checksum differs")
        return Checkpoint(
            network=load_file(path / "network.safetensors"),
            optimizer=load_file(path / "optimizer.safetensors"),
            state=json.loads((path / STATE_FILE).read_text()),
        )
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _MISSING:
            raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}") from error


def _by_step(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = [(pattern.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _part(folder: Path, name: str) -> Path:
    """Return the temporary path of a file or folder that is being written, replaced or removed."""
    return folder / f".{name}{_PART_SUFFIX}"


def _remove_parts(folder: Path) -> None:
    """Remove what killed writes left, and restore a replaced checkpoint whose successor was never renamed into place."""
    for step, replaced in _by_step(folder, _REPLACED):
        final = folder / f"step-{step:08d}"
        if not final.exists():
            replaced.rename(final)
    for part in folder.glob(_part(folder, "step-*").name):
        shutil.rmtree(part, ignore_errors=True)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename a checkpoint to its final name. rename(2) cannot replace a folder with files in it, so an existing checkpoint of
    the same step is renamed first."""
    replaced = _part(final.parent, f"{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _link_best(folder: Path, final: Path) -> None:
    temporary = _part(folder, BEST)
    temporary.unlink(missing_ok=True)
    # Relative, so that the run folder may move.
    temporary.symlink_to(final.name)
    temporary.replace(folder / BEST)
    sync_folder(folder)


def _remove_old(folder: Path, newest_step: int, keep: int) -> None:
    best = (folder / BEST).readlink().name if (folder / BEST).is_symlink() else None
    for _, old in [entry for entry in _by_step(folder, _NAME) if entry[0] <= newest_step][:-keep]:
        if old.name != best:
            # Rename first, so that a kill during the removal leaves no incomplete checkpoint under a valid name.
            dropped = _part(folder, f"{old.name}.dropped")
            with suppress(OSError):
                old.rename(dropped)
                shutil.rmtree(dropped, ignore_errors=True)


def _write_file(path: Path, parts: Sequence[memoryview]) -> str:
    """Write and sync a new file; returns its sha256. Hashing and writing release the GIL, so training continues meanwhile."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            for begin in range(0, len(part), CHUNK_BYTES):
                chunk = part[begin : begin + CHUNK_BYTES]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

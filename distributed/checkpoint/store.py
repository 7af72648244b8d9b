"""Checkpoints that are whole or not there: written aside, synced, renamed, and recognised by checksums.

Nothing is executed on loading: weights and optimizer state are safetensors, everything else is JSON.

A kill at any byte leaves the checkpoint that is being written or the one before it whole. Folders under other names than
`step-XXXXXXXX` are of writes, replacements and removals that have not ended; the next write clears them away.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .host_snapshot import HostCopy

BEST = "best"
"""The link, beside the checkpoints, to the one that scored best."""

_NAME = re.compile(r"step-(\d{8})")
_REPLACED = re.compile(r"\.step-(\d{8})\.replaced\.part")
_CHECKSUMS = "sha256.json"
_CHUNK_BYTES = 4 << 20


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used."""


@dataclass(frozen=True)
class Checkpoint:
    """`network` and `optimizer` by name; `state` is plain JSON with at least `step`, the steps taken."""

    network: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class Snapshot:
    """A checkpoint's files in host memory, apart from the live tensors; the memory is used again by the next `take`."""

    def __init__(self) -> None:
        self.step = -1
        self._network, self._optimizer, self._state = HostCopy(), HostCopy(), b""

    def take(self, checkpoint: Checkpoint) -> None:
        self.step = checkpoint.state["step"]
        self._network.take(checkpoint.network)
        self._optimizer.take(checkpoint.optimizer)
        self._state = json.dumps(checkpoint.state, indent=1).encode()

    def files(self) -> dict[str, list[memoryview]]:
        """The bytes of each file, in parts."""
        return {
            "network.safetensors": self._network.parts(),
            "optimizer.safetensors": self._optimizer.parts(),
            "state.json": [memoryview(self._state)],
        }


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int, best: bool = False) -> Path:
    """Copy and write a checkpoint before returning; see `write_snapshot`."""
    snapshot = Snapshot()
    snapshot.take(checkpoint)
    return write_snapshot(folder, snapshot, keep, best)


def write_snapshot(folder: Path, snapshot: Snapshot, keep: int, best: bool = False) -> Path:
    """Write `folder/step-XXXXXXXX`; then drop all but the `keep` newest up to it, and the best; one process calls it.

    `best`: let the link `best` point to it. Checkpoints of later steps stay: the run has gone back behind them, and could not
    read them when it did. The folder must be there: where it was on a file system that is gone, making it again would put
    checkpoints where nobody looks for them.

    Raises CheckpointError, with the reason, when it cannot be written; an earlier checkpoint is then still there.
    """
    final = folder / f"step-{snapshot.step:08d}"
    aside = folder / f".{final.name}.part"
    try:
        _clear_parts(folder)
        aside.mkdir()
        digests = {name: _write_file(aside / name, parts) for name, parts in snapshot.files().items()}
        _write_file(aside / _CHECKSUMS, [memoryview(json.dumps(digests, indent=1).encode())])
        _sync(aside)
        _put_in_place(aside, final)
        if best:
            _link_best(folder, final)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"cannot write {final}: {error}") from error
    with suppress(OSError):  # the folder went away behind the write: the next one says so, and this one stands
        _drop_old(folder, snapshot.step, keep)
    return final


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, or None; and a line for each broken one that was passed over."""
    broken: list[str] = []
    for _, path in sorted([*_by_step(folder, _REPLACED), *_by_step(folder, _NAME)], reverse=True):
        try:
            return load_checkpoint(path), broken
        except CheckpointError as error:
            broken.append(str(error))
    return None, broken


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder. Raises CheckpointError when a file is missing or not what was written."""
    try:
        digests: dict[str, str] = json.loads((path / _CHECKSUMS).read_text())
        for name, digest in digests.items():
            if _sha256(path / name) != digest:
                raise CheckpointError(f"{path / name} is not what was written: its checksum differs")
        return Checkpoint(
            network=load_file(path / "network.safetensors"),
            optimizer=load_file(path / "optimizer.safetensors"),
            state=json.loads((path / "state.json").read_text()),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}") from error


def _by_step(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = [(pattern.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _clear_parts(folder: Path) -> None:
    """What a killed write left: it would hold its space for ever. One that was moved for a successor that never came returns."""
    for step, replaced in _by_step(folder, _REPLACED):
        final = folder / f"step-{step:08d}"
        if not final.exists():
            replaced.rename(final)
    for part in folder.glob(".step-*.part"):
        shutil.rmtree(part, ignore_errors=True)


def _put_in_place(aside: Path, final: Path) -> None:
    """Rename; a folder cannot be renamed over one with files in it, so one of the same step steps aside until then."""
    replaced = final.with_name(f".{final.name}.replaced.part")
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _link_best(folder: Path, final: Path) -> None:
    aside = folder / f".{BEST}.part"
    aside.unlink(missing_ok=True)
    aside.symlink_to(final.name)  # relative: the run folder may move
    aside.replace(folder / BEST)
    _sync(folder)


def _drop_old(folder: Path, newest_step: int, keep: int) -> None:
    best = (folder / BEST).readlink().name if (folder / BEST).is_symlink() else None
    for _, old in [entry for entry in _by_step(folder, _NAME) if entry[0] <= newest_step][:-keep]:
        if old.name != best:
            # Renamed first: a kill while it is removed leaves no half under its own name.
            doomed = folder / f".{old.name}.dropped.part"
            with suppress(OSError):
                old.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def _write_file(path: Path, parts: Sequence[memoryview]) -> str:
    """Write and sync a new file; its sha256. Both calls that take time release Python's lock, for the training beside them."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            for begin in range(0, len(part), _CHUNK_BYTES):
                chunk = part[begin : begin + _CHUNK_BYTES]
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

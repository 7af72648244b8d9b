"""Checkpoints that are whole or not there: written aside, synced, renamed, and recognised by checksums.

Nothing is executed on loading: weights and optimizer state are safetensors, everything else is JSON.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_NAME = re.compile(r"step-(\d{8})")
_CHECKSUMS = "sha256.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used."""


@dataclass(frozen=True)
class Checkpoint:
    """`network` and `optimizer` by name; `state` is plain JSON with at least `step`, the steps taken."""

    network: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step-XXXXXXXX` and drop all but the `keep` newest; one process calls it.

    Raises CheckpointError, with the reason, when it cannot be written; an earlier checkpoint is then still there.
    """
    final = folder / f"step-{checkpoint.state['step']:08d}"
    aside = folder / f".{final.name}.part"
    replaced = folder / f".{final.name}.replaced.part"
    try:
        for part in folder.glob(".step-*.part"):  # of a write that was killed: it would hold its space for ever
            shutil.rmtree(part, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(_contiguous(checkpoint.network), aside / "network.safetensors")
        save_file(_contiguous(checkpoint.optimizer), aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps(checkpoint.state, indent=1))
        digests = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
        (aside / _CHECKSUMS).write_text(json.dumps(digests, indent=1))
        for path in aside.iterdir():
            _sync(path)
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        _sync(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"cannot write {final}: {error}") from error
    for _, old in _by_step(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, or None; and a line for each broken one that was passed over."""
    broken: list[str] = []
    for _, path in reversed(_by_step(folder)):
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


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

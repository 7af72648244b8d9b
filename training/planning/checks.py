"""Check what would keep a run from starting, without starting it."""

import os

from distributed.topology import find_topology
from pipelines.manifest import Manifest, ManifestRow, in_shard
from training.config.schema import DataConfig
from training.errors import ConfigError, DataError
from training.runs.run_folder import RunFolder

# Per split: enough to notice a disk that is not mounted, and few enough for a slow file system.
CHECKED_FILES = 500


def check_single_process() -> None:
    topology = find_topology()
    if topology.size > 1:
        raise ConfigError(
            f"plan.py runs in one process only, and {topology.launcher} started {topology.size}. Fix: python plan.py, "
            f"without a launcher, with distributed.world_size={topology.size}"
        )


def check_files(data: DataConfig, manifest: Manifest) -> None:
    """Look for the files of some clips. Raises DataError if more are missing than a run tolerates."""
    rows = sample_rows(manifest)
    missing = [problem for row in rows if (problem := _problem(manifest, row)) is not None]
    if len(missing) > data.max_bad_clips:
        raise DataError(
            f"{manifest.path}: the files of {len(missing)} of {len(rows)} checked clips are missing ({missing[0]}). "
            f"Fix: restore the files, or make the manifest again ({data.prepare or 'prepare.py'})"
        )


def _problem(manifest: Manifest, row: ManifestRow) -> str | None:
    """Return why a clip's file or folder of images cannot be used, or None."""
    is_folder = row.is_images and not in_shard(row)
    path = manifest.root / (row.path.rsplit("/", 1)[0] if is_folder else row.path)
    try:
        if is_folder:
            return None if path.exists() else f"{path}: no such folder"
        if path.stat().st_size < row.offset + row.length:
            return f"{path} is shorter than its manifest says"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def sample_rows(manifest: Manifest) -> list[ManifestRow]:
    """Return some rows of a manifest, evenly spread."""
    count = min(CHECKED_FILES, len(manifest))
    return [manifest.row(number * len(manifest) // count) for number in range(count)]


def check_run_folder(folder: RunFolder) -> None:
    """Check that the run folder can be made. Raises ConfigError."""
    existing = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        reason = "is not writable" if existing.is_dir() else "is a file"
        raise ConfigError(f"cannot make the run folder {folder.path}: {existing} {reason}. Fix: outputs=FOLDER")

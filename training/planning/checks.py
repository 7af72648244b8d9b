"""What would keep a run from starting, found without starting it."""

import os

from distributed.topology import find_topology
from pipelines.manifest import JPEG_FRAMES, Manifest, ManifestRow, in_shard
from training.config.schema import Config
from training.errors import ConfigError, DataError
from training.runs.run_folder import RunFolder

FILES_LOOKED_AT = 500  # of each split: enough to see that a disk is not mounted, few enough for a slow file system


def check_alone() -> None:
    topology = find_topology()
    if topology.size > 1:
        raise ConfigError(
            f"plan.py is the work of one process, and {topology.launcher} started {topology.size}. Fix: python plan.py, "
            f"without a launcher, with distributed.world_size={topology.size}"
        )


def check_files(config: Config, manifest: Manifest) -> None:
    """Look for the files of some clips. Raises DataError for more missing ones than a run tolerates."""
    rows, missing = looked_at(manifest), []
    for row in rows:
        is_folder = row.codec == JPEG_FRAMES and not in_shard(row)
        path = manifest.root / (row.path.rsplit("/", 1)[0] if is_folder else row.path)
        try:
            cut_short = not is_folder and path.stat().st_size < row.offset + row.length
            if cut_short or not path.exists():
                missing.append(f"{path} is shorter than its manifest says" if cut_short else f"{path}: no such folder")
        except OSError as error:
            missing.append(f"{path}: {error.strerror}")
    if len(missing) > config.data.max_bad_clips:
        raise DataError(
            f"{manifest.path}: of {len(rows)} clips looked at, {len(missing)} are not there ({missing[0]}). "
            f"Fix: restore the files, or make the manifest anew ({config.data.prepare or 'prepare.py'})"
        )


def looked_at(manifest: Manifest) -> list[ManifestRow]:
    """Some rows, evenly spread."""
    count = min(FILES_LOOKED_AT, len(manifest))
    return [manifest.row(number * len(manifest) // count) for number in range(count)]


def check_folder(folder: RunFolder) -> None:
    existing = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        reason = "is not writable" if existing.is_dir() else "is a file"
        raise ConfigError(f"cannot make the run folder {folder.path}: {existing} {reason}. Fix: outputs=FOLDER")

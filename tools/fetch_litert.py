"""Install litert-torch, the converter of `export.py format=litert`, into a folder of its own.

    python -m tools.fetch_litert               # to ~/.cache/tsm-at-scale/litert-torch-..., once; prints the folder

It needs other versions of packages than this project. torch and NumPy come from this environment: only the packages of
tools/litert.lock are installed, and pip refuses a file whose hash is not there. HASHES=off: any file of these versions.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from runtime.file_lock import file_lock
from training.deploy.export.litert_packages import packages_folder

LOCK = Path(__file__).with_name("litert.lock")


def requirements(hashes: bool) -> str:
    """Return the lock for pip, or its versions and markers only."""
    text = LOCK.read_text()
    return text if hashes else "\n".join(re.findall(r"^[a-z0-9-]+==[^\\\n]+", text, re.MULTILINE))


def fetch_litert() -> Path:
    """Return the folder; install the packages if it is missing. Raises CalledProcessError if pip cannot get them."""
    folder = packages_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            hashes = os.environ.get("HASHES") != "off"
            aside = Path(tempfile.mkdtemp(dir=folder.parent))
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            checks = ["--require-hashes", "--only-binary", ":all:"] if hashes else []
            try:
                subprocess.run(
                    [*pip, *checks, "--target", str(aside), "--requirement", "/dev/stdin"],
                    input=requirements(hashes),
                    text=True,
                    check=True,
                )
                os.replace(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return folder


if __name__ == "__main__":
    try:
        print(fetch_litert())
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"fetch_litert: pip failed ({error.returncode}), and nothing is kept. Fix: what pip prints above, then again"
        )

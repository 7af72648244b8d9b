"""A later NVIDIA DALI than the environment's, in a folder of its own: for tests of what differs between versions.

    python tools/fetch_dali.py               # to ~/.cache/tsm-at-scale/dali-2.4.0, about 500 MB; prints the folder

It goes in front of the environment: PYTHONPATH=FOLDER python ...
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tsm-at-scale"
VERSION = "2.4.0"
# With what of NVIDIA's follows its version; the rest, NumPy above all, stays the environment's.
REQUIREMENTS = (f"nvidia-dali-cuda130=={VERSION}", "nvidia-nvimgcodec-cu13==0.9.0.20")


def fetch_dali(cache: Path = CACHE) -> Path:
    """The folder, which is made when it is not there. Raises CalledProcessError where pip cannot get it."""
    folder = cache / f"dali-{VERSION}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=cache))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", str(aside), *REQUIREMENTS], check=True)
        # The environment's NVIDIA packages share the name `nvidia`, some with a file like this: the first lets others in.
        shared = aside / "nvidia" / "__init__.py"
        shared.write_text("__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n")
        os.replace(aside, folder)
    return folder


if __name__ == "__main__":
    print(fetch_dali())

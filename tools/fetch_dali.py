"""Install a newer NVIDIA DALI than the environment's into a separate folder, for tests of differences between versions.

    python tools/fetch_dali.py               # to ~/.cache/tsm-at-scale/dali-2.4.0, about 500 MB; prints the folder

Put it before the environment's packages: PYTHONPATH=FOLDER python ...
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tsm-at-scale"
VERSION = "2.4.0"
# DALI and the NVIDIA packages tied to its version. All others, above all NumPy, come from the environment.
REQUIREMENTS = (f"nvidia-dali-cuda130=={VERSION}", "nvidia-nvimgcodec-cu13==0.9.0.20")


def fetch_dali(cache: Path = CACHE) -> Path:
    """Return the folder; install DALI there if it is missing. Raises CalledProcessError if pip cannot get it."""
    folder = cache / f"dali-{VERSION}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=cache))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", str(aside), *REQUIREMENTS], check=True)
        # The environment's NVIDIA packages share the namespace `nvidia`. Extend its path, so that both folders are searched.
        shared = aside / "nvidia" / "__init__.py"
        shared.write_text("__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n")
        os.replace(aside, folder)
    return folder


if __name__ == "__main__":
    print(fetch_dali())

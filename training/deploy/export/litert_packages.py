"""The folder of the packages that convert to LiteRT, which tools/fetch_litert.py makes. It loads without torch."""

import os
import sys
from pathlib import Path

from training.errors import ConfigError

VERSION = "0.10.0"
"""Of the converter, litert-torch."""


def packages_folder() -> Path:
    """Return the folder of the converter's packages, which are compiled for one version of Python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tsm-at-scale" / f"litert-torch-{VERSION}-{sys.implementation.cache_tag}"


def converter_versions() -> dict[str, str]:
    """Return the version of the converter. Raises ConfigError if it is not there."""
    if not packages_folder().is_dir():
        raise ConfigError(
            f"format=litert needs the converter litert-torch in {packages_folder()}. "
            "Fix: .venv/bin/python -m tools.fetch_litert, once, or format=executorch"
        )
    return {"litert-torch": VERSION}

"""A check of an output file that a command writes after its work."""

import os
from pathlib import Path


def why_no_file(path: Path, *inputs: Path) -> str:
    """Tell why a file cannot be written, with the fix, or that it would replace an input; empty if nothing is wrong."""
    folder = path.absolute().parent
    try:
        if not folder.is_dir():
            return f"there is no folder {folder}. Fix: make it"
        if path.is_dir():
            return f"it is a folder. Fix: {path / 'NAME'}{path.suffix}"
        if not os.access(folder, os.W_OK):
            return f"you may not write to {folder}. Fix: another folder"
        if path.exists() and any(each.exists() and each.samefile(path) for each in inputs):
            return "it is the input. Fix: another name"
    except OSError as error:
        return f"{error.strerror}. Fix: another name"
    return ""

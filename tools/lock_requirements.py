"""Write requirements.lock and tools/litert.lock: the hashes of all files of every pinned version.

    pip install uv                                   # into any environment: only this program needs it
    python -m tools.lock_requirements

Renew it whenever constraints.txt or a group of pyproject.toml changes. uv resolves each group for all platforms and Python
versions, within constraints.txt; the hashes are those that the package index states. Review the difference before you commit it:
a new hash of an unchanged version means that someone replaced or added a file.

tools/litert.lock has what litert-torch (tools/fetch_litert.py) needs beside the core packages. Only this lock pins
those versions: a new call takes newer ones.
"""

import re
import subprocess
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from tools.fetch_litert import LOCK as LITERT_LOCK
from tools.requirements import CONSTRAINTS, LOCK, PYPROJECT, locked, name_of, requirements
from training.deploy.export.litert_packages import VERSION as LITERT_VERSION

HEADER = """\
# Made by tools/lock_requirements.py; do not edit. Packages of constraints.txt with the SHA-256 of every file of that version, below
# the groups of pyproject.toml that need them. `tools/requirements.py --locked GROUP...` prints the entries of groups."""
OLDEST_PYTHON = "3.11"
LITERT_HEADER = """\
# Made by tools/lock_requirements.py; do not edit. What tools/fetch_litert.py installs beside the core packages of
# requirements.lock."""
# For language models and for litert-torch's own command line. Converting imports none of them.
LITERT_UNUSED = ("fire", "kagglehub", "litert-lm-builder", "sentencepiece", "transformers")


def groups() -> list[str]:
    """List the groups of pyproject.toml."""
    return ["core", *tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]]


def compile_entries(lines: Sequence[str], *options: str) -> list[str]:
    """Return the entries of all that these requirement lines need."""
    command = ["uv", "--no-config", "pip", "compile", "--quiet", "--universal", "--python-version", OLDEST_PYTHON]
    command += [*options, "--generate-hashes", "--no-header", "--no-annotate", "-"]
    done = subprocess.run(command, input="\n".join(lines), stdout=subprocess.PIPE, text=True, check=True)
    return re.split(r"\n(?=\S)", done.stdout.strip())


def litert_entries() -> list[str]:
    """Return what litert-torch needs that is not a core package, or needs in another version."""
    core = [entry.partition(" ")[0] for entry in locked(["core"])]
    # xdsl, which litert-torch needs, takes no newer typing-extensions.
    pins = [entry.partition(" ")[0] for entry in locked(["core", "litert"])]
    fixed = [pin for pin in pins if name_of(pin) != "typing-extensions"]
    with tempfile.TemporaryDirectory() as temporary:
        constraints, overrides = Path(temporary) / "constraints.txt", Path(temporary) / "overrides.txt"
        constraints.write_text("\n".join(fixed))
        overrides.write_text("\n".join(f"{name}; python_version < '3'" for name in LITERT_UNUSED))
        options = ["--constraint", str(constraints), "--override", str(overrides)]
        entries = compile_entries([f"litert-torch=={LITERT_VERSION}"], *options)
    return [entry for entry in entries if re.split(r"[ ;]", entry)[0] not in core and "win32" not in entry]


def resolve(*names: str) -> dict[str, str]:
    """Return the entry (requirement line and hashes) of every package that groups need, by package name."""
    # Horovod is built by tools/horovod, which knows the hash of its source.
    lines = [line for line in requirements(list(names)) if name_of(line) != "horovod"]
    entries = compile_entries(lines, "--constraint", str(CONSTRAINTS))
    # What only other systems than Linux need is not pinned.
    pinned = {name_of(line) for line in CONSTRAINTS.read_text().splitlines() if re.match(r"\w", line)}
    return {name_of(entry): entry for entry in entries if name_of(entry) in pinned}


def write_litert_lock() -> None:
    """Write tools/litert.lock."""
    found = litert_entries()
    LITERT_LOCK.write_text("\n\n".join([LITERT_HEADER, *found]) + "\n")
    print(f"{LITERT_LOCK}: {len(found)} packages")


def main() -> None:
    """Resolve every group, and write the file."""
    groups_of: dict[str, list[str]] = {}
    for group in groups():
        for name in resolve(group):
            groups_of.setdefault(name, []).append(group)
    entries = resolve(*groups())
    blocks = [f"# {' '.join(groups_of[name])}\n{entries[name]}" for name in sorted(entries)]
    LOCK.write_text("\n\n".join([HEADER, *blocks]) + "\n")
    print(f"{LOCK}: {len(blocks)} packages")
    write_litert_lock()


if __name__ == "__main__":
    main()

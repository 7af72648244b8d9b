"""Write requirements.lock: the hashes of all files of every pinned version, and the groups that need each package.

    pip install uv                                   # into any environment: only this program needs it
    python -m tools.lock_requirements

Renew it whenever constraints.txt or a group of pyproject.toml changes. uv resolves each group for all platforms and Python
versions, within constraints.txt; the hashes are those that the package index states. Review the difference before you commit it:
a new hash of an unchanged version means that someone replaced or added a file.
"""

import re
import subprocess
import tomllib

from tools.requirements import CONSTRAINTS, LOCK, PYPROJECT, name_of, requirements

HEADER = """\
# Made by tools/lock_requirements.py; do not edit. Packages of constraints.txt with the SHA-256 of every file of that version, below
# the groups of pyproject.toml that need them. `tools/requirements.py --locked GROUP...` prints the entries of groups."""
OLDEST_PYTHON = "3.11"


def groups() -> list[str]:
    """List the groups of pyproject.toml."""
    return ["core", *tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]]


def resolve(*names: str) -> dict[str, str]:
    """Return the entry (requirement line and hashes) of every package that groups need, by package name."""
    # Horovod is built by tools/horovod, which knows the hash of its source.
    lines = [line for line in requirements(list(names)) if name_of(line) != "horovod"]
    command = ["uv", "--no-config", "pip", "compile", "--quiet", "--universal", "--python-version", OLDEST_PYTHON]
    command += ["--constraint", str(CONSTRAINTS), "--generate-hashes", "--no-header", "--no-annotate", "-"]
    done = subprocess.run(command, input="\n".join(lines), stdout=subprocess.PIPE, text=True, check=True)
    entries = re.split(r"\n(?=\S)", done.stdout.strip())
    # What only other systems than Linux need is not pinned.
    pinned = {name_of(line) for line in CONSTRAINTS.read_text().splitlines() if re.match(r"\w", line)}
    return {name_of(entry): entry for entry in entries if name_of(entry) in pinned}


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


if __name__ == "__main__":
    main()

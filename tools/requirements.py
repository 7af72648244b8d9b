"""Print requirements of pyproject.toml, one per line: the core ones, or those of the named extras.

    python tools/requirements.py dev mpi | pip install -c constraints.txt -r /dev/stdin

pip can install an extra only together with the project, and the project is never installed. `core` selects the core
requirements together with extras. `--without NAME` omits a requirement (tools/horovod builds Horovod).

    python tools/requirements.py --locked dev mpi | pip install --require-hashes --no-deps -r /dev/stdin

`--locked` prints the entries of requirements.lock instead: everything that the groups need, in the pinned versions, with the
hashes of their files. pip then refuses any other file before it runs or unpacks any of it.
"""

import argparse
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
CONSTRAINTS = ROOT / "constraints.txt"
LOCK = ROOT / "requirements.lock"


def normalized(name: str) -> str:
    """Normalize a package name (PEP 503): `PyYAML` becomes `pyyaml`, `a_b` becomes `a-b`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    """Return the normalized package name at the start of a requirement line."""
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    if match is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return normalized(match.group(1))


def requirements(groups: list[str], pyproject: Path = PYPROJECT) -> list[str]:
    """Return the requirement lines of the groups, in order; `core` is the project's `dependencies`, all others are extras."""
    project = tomllib.loads(pyproject.read_text())["project"]
    known = {"core": project["dependencies"], **project["optional-dependencies"]}
    unknown = [group for group in groups if group not in known]
    if unknown:
        raise ValueError(f"pyproject.toml has no group {', '.join(unknown)}; it has {', '.join(known)}")
    return [line for group in groups for line in known[group]]


def locked(groups: list[str], lock: Path = LOCK) -> list[str]:
    """Return the entries of requirements.lock that the groups need: packages with versions and hashes."""
    requirements(groups)
    # A comment with the groups, then the entry.
    blocks = (block.partition("\n") for block in lock.read_text().strip().split("\n\n")[1:])
    return [entry for comment, _, entry in blocks if not set(groups).isdisjoint(comment.split())]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=["core"])
    parser.add_argument("--without", action="append", default=[], metavar="NAME")
    parser.add_argument("--locked", action="store_true", help="print entries with hashes, of all that the groups need")
    args = parser.parse_args()
    left_out = {normalized(name) for name in args.without}
    try:
        lines = locked(args.groups) if args.locked else requirements(args.groups)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(line for line in lines if name_of(line) not in left_out))


if __name__ == "__main__":
    main()

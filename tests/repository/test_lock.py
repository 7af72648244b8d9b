"""Check requirements.lock: it covers every pin and group, and pip refuses a file with another hash before running it."""

import re
import subprocess
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.horovod import build
from tools.lock_requirements import groups
from tools.requirements import CONSTRAINTS, LOCK, locked, name_of, requirements

PIN = re.compile(r"^([a-z0-9-]+)==([^ \n]+)", re.MULTILINE)
GROUPS = groups()
# Built by tools/horovod.
HOROVOD = "horovod"
RENEW = "Fix: python -m tools.lock_requirements"


def test_the_lock_has_the_pinned_versions() -> None:
    pins = dict(PIN.findall(CONSTRAINTS.read_text()))
    assert pins.pop(HOROVOD)
    assert dict(PIN.findall(LOCK.read_text())) == pins, RENEW


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_is_locked(group: str) -> None:
    entries = {name_of(entry): entry for entry in locked([group])}
    assert {name_of(line) for line in requirements([group])} - {HOROVOD} <= entries.keys(), RENEW
    for entry in entries.values():
        first, *hashes = entry.split(" \\\n")
        assert PIN.match(first) and hashes
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line) for line in hashes), entry


@pytest.mark.parametrize("group", GROUPS)
def test_what_installed_packages_need_is_locked(group: str) -> None:
    """Compare with the metadata of the packages here, because --no-deps lets pip install what is listed and no more."""
    names = {name_of(entry) for entry in locked([group])}
    for name in names:
        try:
            needed = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            # Not for this platform, or of a group that is not installed.
            continue
        missing = {
            name_of(each.name) for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})
        } - names
        assert not missing, f"{name} needs {missing}. {RENEW}"


def test_two_groups_are_joined_without_repetition() -> None:
    both = [name_of(entry) for entry in locked(["core", "dev"])]
    assert sorted(both) == sorted({name_of(entry) for group in ("core", "dev") for entry in locked([group])})
    with pytest.raises(ValueError, match="no group nonsense"):
        locked(["nonsense"])


def test_horovods_packages_are_checked_unless_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HASHES", raising=False)
    command = build.pip_install("horovod-build", tmp_path)
    assert "--require-hashes" in command
    assert Path(command[-1]).read_text().count("--hash=") > 2
    monkeypatch.setenv("HASHES", "off")
    command = build.pip_install("horovod", tmp_path)
    assert "--require-hashes" not in command and CONSTRAINTS in command
    assert not any(str(word).startswith(HOROVOD) for word in command[command.index("install") :])


@pytest.mark.slow
def test_pip_refuses_a_replaced_source_before_running_it(tmp_path: Path) -> None:
    """Offer a package of the right name and version, whose setup.py leaves a proof."""
    folder = tmp_path / "antlr4-python3-runtime-4.9.3"
    folder.mkdir()
    proof = tmp_path / "proof"
    (folder / "setup.py").write_text(f"open({str(proof)!r}, 'w')\nraise SystemExit(3)\n")
    (folder / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: antlr4-python3-runtime\nVersion: 4.9.3\n")
    with tarfile.open(f"{folder}.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    (entry,) = (entry for entry in locked(["core"]) if name_of(entry) == "antlr4-python3-runtime")
    command = [sys.executable, "-m", "pip", "download", "--isolated", "--no-index", "--find-links", str(tmp_path)]
    command += ["--no-deps", "--no-build-isolation", "--dest", str(tmp_path / "to"), "--requirement", "/dev/stdin"]
    done = subprocess.run([*command, "--require-hashes"], input=entry, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr, done.stderr
    assert not proof.exists()
    # Without the hash, pip runs it.
    unchecked = entry.partition(" ")[0]
    assert subprocess.run(command, input=unchecked, capture_output=True, text=True, timeout=120).returncode != 0
    assert proof.exists()

"""The converter's packages: the lock, and a folder that appears only when it is complete."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import fetch_litert
from tools.requirements import locked
from training.deploy.export.litert_packages import VERSION, packages_folder

PIN = re.compile(r"^([a-z0-9-]+)==([^ \n]+)", re.MULTILINE)


def test_the_lock_has_the_converter_with_hashes_and_not_what_this_environment_has() -> None:
    text = fetch_litert.LOCK.read_text()
    pins = dict(PIN.findall(text))
    assert pins["litert-torch"] == VERSION
    entries = [entry for entry in re.split(r"\n(?=\S)", text.strip()) if not entry.startswith("#")]
    assert len(entries) >= len(pins) and all("--hash=sha256:" in entry for entry in entries)
    core = dict(PIN.findall("\n".join(locked(["core"]))))
    assert "torch" not in pins and "numpy" not in pins
    assert [name for name in pins if core.get(name) == pins[name]] == []
    lines = [line.strip() for line in fetch_litert.requirements(hashes=False).splitlines()]
    # With its marker: another Python may need another version.
    assert lines == [entry.partition(" \\")[0] for entry in entries]


def test_a_failed_install_leaves_no_folder_and_a_second_call_installs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HASHES", raising=False)
    commands: list[list[str]] = []

    def pip(command: list[str], **options: Any) -> None:
        commands.append(command)
        target = Path(command[command.index("--target") + 1])
        (target / "litert_torch").mkdir()
        if len(commands) == 1:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(fetch_litert.subprocess, "run", pip)
    with pytest.raises(subprocess.CalledProcessError):
        fetch_litert.fetch_litert()
    assert [path for path in packages_folder().parent.iterdir() if path.is_dir()] == []
    assert fetch_litert.fetch_litert() == packages_folder()
    assert (packages_folder() / "litert_torch").is_dir()
    fetch_litert.fetch_litert()
    assert len(commands) == 2 and "--require-hashes" in commands[1] and commands[1][0] == sys.executable

"""tools/first_light, a script for a GPU that this machine lacks, on the CPU and on the fake GPU."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.worlds import CHECKOUT
from tools.first_light.phases import DEFAULT_LIMIT_S, PHASES, Phase, groups_of, run_phases, share_s
from tools.first_light.processes import adopt_orphans, run
from tools.first_light.prune_fatbin import MACHINE_CODE, PTX, prune
from tools.first_light.report import REPORT, Results, errors, running_file
from tools.first_light.settings import WARNINGS, Settings
from tools.first_light.summary import summary

# --- Phases that crash and hang ---------------------------------------------------------------------------------------

INJECTED = '''
import ctypes, json, os, subprocess, sys, time

def fine(results):
    with results.row("one") as row:
        row["figure"] = 1
    report = json.loads((results.settings.out / "first_light.json").read_text())
    with results.row("outcomes on the disk") as row:
        row |= {name: entry["outcome"] for name, entry in report["phases"].items()}

def raises(results):
    with results.row("bad row") as row:
        row["before"] = 1
        raise ValueError("this row failed")
    with results.row("next row") as row:
        row["after"] = 1
    raise KeyError("outside of rows")

def crashes(results):
    with results.row("before the crash") as row:
        row["figure"] = 2
    ctypes.string_at(0)

def hangs(results):
    """Start a rank in a session of its own that ignores SIGTERM, as launchers do, and a forked process."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    rank = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    forked = os.fork()
    if forked:
        with results.row("before the hang") as row:
            row["pids"] = [rank.pid, forked]
    rank.wait() if forked else time.sleep(600)
'''


def settings_of(folder: Path, limit_s: float) -> Settings:
    (folder / "work").mkdir()
    return Settings("dry", folder, folder / "work", time.monotonic() + limit_s, "a device")


@pytest.fixture
def _orphans() -> Iterator[None]:
    """Make this process adopt orphans, as the script does, for one test."""
    adopt_orphans()
    yield
    adopt_orphans(False)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("_orphans")
def test_a_phase_that_crashes_or_hangs_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "injected.py").write_text(INJECTED)
    monkeypatch.syspath_prepend(tmp_path)
    names = ("fine", "raises", "crashes", "hangs", "last")
    shares_s = (1, 1, 1, 0.3, 1)
    phases = [
        Phase(name, f"injected:{name if name != 'last' else 'fine'}", share_s)
        for name, share_s in zip(names, shares_s, strict=True)
    ]
    report: dict[str, Any] = {"warning": None, "commit": "none"}
    started_s = time.monotonic()
    run_phases(phases, settings_of(tmp_path, limit_s=60), report)
    assert time.monotonic() - started_s < 60
    assert json.loads((tmp_path / REPORT).read_text()) == json.loads(json.dumps(report))
    assert not list(tmp_path.glob("running_*"))
    entries = report["phases"]
    outcomes = {name: entry["outcome"] for name, entry in entries.items()}
    assert outcomes == {
        "fine": "ok",
        "raises": "exit code 1",
        "crashes": "exit code -11",
        "hangs": "timeout",
        "last": "ok",
    }
    assert all(entry["duration_s"] <= entry["limit_s"] + 5 for entry in entries.values())
    assert entries["crashes"]["results"]["before the crash"]["figure"] == 2
    # The stack from faulthandler.
    assert "injected.py" in entries["crashes"]["output"]
    assert not any(map(is_running, entries["hangs"]["results"]["before the hang"]["pids"]))
    rows = entries["raises"]["results"]
    assert dict(errors(rows)) == {"bad row": "ValueError: this row failed"}
    assert rows["bad row"]["before"] == rows["next row"]["after"] == 1
    assert "outside of rows" in entries["raises"]["output"]
    # Outcomes that the last phase read from disk when it started.
    seen = entries["last"]["results"]["outcomes on the disk"]
    assert {name: seen[name] for name in names} == outcomes | {"last": "not started"}
    shown = "\n".join(summary(report))
    assert "hangs timeout" in shown and "ValueError: this row failed" in shown and "outside of rows" in shown


def test_a_phase_without_time_is_named(tmp_path: Path) -> None:
    report: dict[str, Any] = {}
    run_phases([Phase("late", "injected:fine", 1)], settings_of(tmp_path, limit_s=1), report)
    assert report["phases"]["late"]["outcome"] == "no time"


def test_the_shares_are_those_of_the_default_limit_and_nine_minutes_are_enough() -> None:
    assert sum(map(share_s, groups_of(PHASES))) == DEFAULT_LIMIT_S
    script = (CHECKOUT / "tools/first_light/first_light.sh").read_text()
    assert "limit_s=${LIMIT_S:-540}" in script


def test_rows_carry_the_device_and_wait_for_no_time_that_is_not_there(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, limit_s=0)
    results = Results(settings, "phase")
    assert [title for title, _ in results.each({"one": 1, "other": 2})] == []
    rows = json.loads(running_file(settings, "phase").read_text())
    assert rows == {
        title: {"device": "a device", "skipped": "no time", "duration_s": 0.0} for title in ("one", "other")
    }


@pytest.mark.usefixtures("_orphans")
def test_a_command_that_is_stopped_leaves_nothing() -> None:
    """Orphans in a session of their own are killed too."""
    orphan = "subprocess.run(['sh', '-c', 'sleep 600 >&- 2>&- & echo $!'], start_new_session=True)"
    ended = run([sys.executable, "-c", f"import subprocess, time; {orphan}; time.sleep(600)"], limit_s=3)
    assert ended.outcome == "timeout"
    assert not is_running(int(ended.output.split()[0]))


# --- The report -------------------------------------------------------------------------------------------------------


def test_the_line_through_step_times() -> None:
    from tools.first_light.speed import fit

    found = fit({clips: 0.004 + 0.0015 * clips for clips in (1, 2, 4, 8, 16, 32, 64)})
    assert found["c0_s"] == pytest.approx(0.004)
    assert found["k_s"] == pytest.approx(0.0015)
    assert found["worst_relative_error"] < 1e-9
    assert fit({1: 1.0, 2: 1.0, 4: 4.0})["worst_relative_error"] > 0.1
    with pytest.raises(ValueError, match="two points"):
        fit({8: 0.02})


@pytest.mark.parametrize("mode", ["fake", "dry"])
def test_the_summary_says_loudly_that_figures_mean_nothing(mode: str) -> None:
    row = {"device": "none", "clips_s": 1.0, "step_s": 1.0, "host_s": 1.0, "mfu": 0.5}
    phases = {"speed": {"outcome": "ok", "results": {"a way": row}}}
    lines = list(summary({"warning": WARNINGS[mode], "commit": "abc", "phases": phases}))
    assert "MEANINGLESS" in lines[1] and "MEANINGLESS" in lines[-1]
    assert any("a way" in line and "clips/s" in line for line in lines)
    assert not any("MEANINGLESS" in line for line in summary({"warning": None, "commit": "abc", "phases": phases}))


def check_report(report: dict[str, Any], mode: str, device: str) -> None:
    """Assert that every phase ended in time, and that its rows name the device and hold no error."""
    assert report["mode"] == mode
    assert list(report["phases"]) == [phase.name for phase in PHASES]
    for name, entry in report["phases"].items():
        assert entry["outcome"] == "ok", (name, entry)
        assert entry["duration_s"] <= entry["limit_s"], (name, entry)
        assert entry["results"], name
        assert not dict(errors(entry["results"])), (name, entry["results"])
        assert all(device in row["device"] for row in entry["results"].values()), name
    phases = report["phases"]
    for name in ("gpu_tests", "dali_tests"):
        outcomes = {row["outcome"] for row in phases[name]["results"].values() if "outcome" in row}
        assert outcomes <= ({"skipped"} if mode == "dry" else {"skipped", "passed"}) and outcomes
    for way in ("numerics=gpu", "numerics=reference"):
        assert {"c0_s", "k_s"} <= phases["scaling"]["results"][f"{way}, fit"].keys()
    assert phases["jobs"]["results"]["deterministic: weights"]["equal"]
    assert phases["ranks"]["results"]["float64, two ranks, torch"]["outcome"] == "ok"


def run_script(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run first_light.sh with one carried wheel; return the report and the output."""
    wheels = folder / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_for_first_light.py", "")
    environment = os.environ | {
        "PYTHON": sys.executable,
        "WHEELS": str(wheels),
        "DALI": str(folder / "no_dali"),
        # Of all phases; each has its share, which a busy machine must not use up.
        "LIMIT_S": "3000",
        "TMPDIR": str(folder),
    }
    command = ["bash", "tools/first_light/first_light.sh", str(folder / "out"), *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "unpacked" in done.stdout
    assert (folder / "out/console.log").read_text() in done.stdout
    assert list(folder.glob("tmp.*")) == list(folder.glob("first_light_*")) == []
    text = (folder / "out" / REPORT).read_text()
    assert "MEANINGLESS" in text.splitlines()[0]
    return json.loads(text), done.stdout


@pytest.mark.slow
def test_the_dry_run_goes_through_every_phase(tmp_path: Path) -> None:
    report, printed = run_script(tmp_path, "--dry")
    check_report(report, "dry", "dry run")
    equivalence = report["phases"]["equivalence"]["results"]
    assert all(row["equal"] for row in equivalence.values())
    assert "DRY RUN" in printed.splitlines()[-2]


@pytest.mark.fake_gpu
def test_the_fake_gpu_runs_the_cuda_code_of_every_phase(tmp_path: Path) -> None:
    report, printed = run_script(tmp_path)
    check_report(report, "fake", "fake GPU")
    assert all(row["waits"] == 0 for row in report["phases"]["waits"]["results"].values())
    assert "FAKE GPU" in printed.splitlines()[-2]


# --- Carried files ----------------------------------------------------------------------------------------------------


def entry(kind: int, generation: int, code: bytes) -> bytes:
    """Entry of a fat binary: a header of 64 bytes, then the code."""
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(code)).ljust(28, b"\0") + struct.pack("<I", generation)
    return header.ljust(64, b"\0") + code


def fat_binary(*entries: bytes) -> bytes:
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, sum(map(len, entries))) + b"".join(entries)


def make_library(folder: Path, section: bytes) -> Path:
    """Build a shared library with this content as its `.nv_fatbin`."""
    missing = [tool for tool in ("gcc", "readelf") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here")
    (folder / "section").write_bytes(section)
    section_of = f'.section .nv_fatbin,\\"a\\"\\n.balign 8\\n.incbin \\"{folder}/section\\"\\n.previous'
    (folder / "library.c").write_text(f'__asm__("{section_of}");int one(void){{return 1;}}\n')
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "library.so", folder / "library.c"], check=True)
    return folder / "library.so"


def test_pruning_keeps_what_the_gpu_runs(tmp_path: Path) -> None:
    codes = {
        name: (name.encode() * 40)[:160]
        for name in ("ptx90", "sm80", "sm90", "only80", "ptx80", "sm100", "old86", "old80", "ptx50")
    }
    first = fat_binary(
        entry(PTX, 90, codes["ptx90"]), entry(MACHINE_CODE, 80, codes["sm80"]), entry(MACHINE_CODE, 90, codes["sm90"]),
        entry(MACHINE_CODE, 100, codes["sm100"]),
    )  # fmt: skip
    second = fat_binary(entry(MACHINE_CODE, 80, codes["only80"]), entry(PTX, 80, codes["ptx80"]))
    library = make_library(tmp_path, first + bytes(32) + second)
    counted = prune(library, tmp_path / "pruned.so", 90)
    pruned = (tmp_path / "pruned.so").read_bytes()
    assert len(pruned) == library.stat().st_size
    kept = {name for name, code in codes.items() if code in pruned}
    # Machine code for sm_90; where its major version has none, the PTX that the driver compiles.
    assert kept == {"sm90", "ptx80"}
    assert counted == {"kept": 320, "blanked": 640}
    prune(library, tmp_path / "pruned.so", 86)
    kept = {name for name, code in codes.items() if code in (tmp_path / "pruned.so").read_bytes()}
    assert kept == {"sm80", "only80"}
    subprocess.run(
        [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1]).one()", tmp_path / "pruned.so"], check=True
    )


def test_a_library_without_code_for_the_gpu_is_refused(tmp_path: Path) -> None:
    library = make_library(tmp_path, fat_binary(entry(MACHINE_CODE, 80, b"x" * 64)))
    with pytest.raises(ValueError, match="no code that a GPU of generation 90"):
        prune(library, tmp_path / "pruned.so", 90)
    assert not (tmp_path / "pruned.so").exists()


def test_a_fat_binary_of_another_form_is_refused(tmp_path: Path) -> None:
    broken = bytearray(fat_binary(entry(MACHINE_CODE, 90, b"x" * 64)))
    # The size field of the entry.
    struct.pack_into("<Q", broken, 16 + 8, 1 << 20)
    library = make_library(tmp_path, bytes(broken))
    with pytest.raises(ValueError, match="not a fat binary"):
        prune(library, tmp_path / "pruned.so", 90)

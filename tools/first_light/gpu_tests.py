"""The tests marked `gpu`, each in its own process, because a CUDA error or a changed switch would fail all later tests."""

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .processes import run
from .report import Results
from .settings import CHECKOUT, Settings

PYTEST = (sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider")
AT_ONCE = 6
TEST_LIMIT_S = 75.0
LAST = ("test_dali", "a_job_with")
"""Tests whose names contain one of these run after all others."""
TINY_TESTS = 2


def gpu_tests(results: Results) -> None:
    """Run each test and report a row for it; tiny runs take only the first two."""
    settings = results.settings
    listing = run([*PYTEST, "-m", "gpu", "--collect-only", *files()], settings.left_s() / 2)
    lines = listing.output.splitlines()
    tests = in_order(line for line in lines if line.startswith("tests/") and "::" in line)
    with results.row("collection") as row:
        row["tests"] = len(tests)
        if listing.exit_code != 0 or not tests:
            row["error"] = listing.output
    folder = settings.work / "junit"
    folder.mkdir()
    with ThreadPoolExecutor(1 if settings.tiny else AT_ONCE) as pool:
        chosen = tests[:TINY_TESTS] if settings.tiny else tests
        running = {
            pool.submit(run_test, settings, folder / f"{number}.xml", test): test for number, test in enumerate(chosen)
        }
        for ended in as_completed(running):
            with results.row(running[ended]) as row:
                row |= ended.result()
    merge_reports(folder, settings.out / "junit.xml")


def files() -> list[str]:
    """Return the files with such tests, so that pytest does not import all others."""
    return sorted(
        str(path.relative_to(CHECKOUT))
        for path in (CHECKOUT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text()
    )


def in_order(tests: Iterable[str]) -> list[str]:
    return sorted(tests, key=lambda test: (any(name in test for name in LAST), test))


def run_test(settings: Settings, report: Path, test: str) -> dict[str, Any]:
    """Run a test; return `outcome` (passed, skipped, failed, timeout or no time) and, unless it passed, `error`."""
    limit_s = settings.left_s() if settings.tiny else min(TEST_LIMIT_S, settings.left_s())
    if limit_s < 2:
        return {"outcome": "no time", "skipped": "no time"}
    ended = run(
        [*PYTEST, "-m", "", f"--junitxml={report}", test], limit_s, {"OMP_NUM_THREADS": "2", "FORBID_SKIPS": "0"}
    )
    if ended.exit_code is None:
        return {"outcome": "timeout", "duration_s": ended.duration_s, "error": f"timeout\n{ended.output[-2500:]}"}
    if ended.exit_code == 0:
        skipped = report.exists() and ElementTree.parse(report).getroot().find(".//skipped")
        if skipped is None or skipped is False:
            return {"outcome": "passed", "duration_s": ended.duration_s}
        return {"outcome": "skipped", "duration_s": ended.duration_s, "skipped": skipped.get("message", "")}
    causes = [line for line in ended.output.splitlines() if line.startswith("E  ")]
    first = causes[0][1:].strip() if causes else f"exit code {ended.exit_code}"
    return {"outcome": "failed", "duration_s": ended.duration_s, "error": f"{first}\n{ended.output[-2500:]}"}


def merge_reports(folder: Path, target: Path) -> None:
    """Merge the reports of all tests into one file in pytest's format."""
    whole = ElementTree.Element("testsuites")
    for path in sorted(folder.glob("*.xml"), key=lambda path: int(path.stem)):
        whole.extend(ElementTree.parse(path).getroot())
    ElementTree.ElementTree(whole).write(target)

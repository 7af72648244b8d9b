"""The tests marked `gpu`. Each test function runs in a process of its own, because a CUDA error would fail all later tests."""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from .forks import run_forked
from .processes import Ended
from .report import Results
from .settings import CHECKOUT

AT_ONCE = 6
TEST_LIMIT_S = 75.0
DALI = "test_dali"
"""Files with this name need DALI, and have a phase of their own."""
TINY_FUNCTIONS = 2
ALREADY_IMPORTED = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
"""pytest cannot rewrite the assertions of modules that this process has imported: they only say less when they fail."""
OPTIONS = ("-q", "--no-header", "-p", "no:cacheprovider", "-m", "gpu", "--capture=no", *ALREADY_IMPORTED)


def gpu_tests(results: Results) -> None:
    """Run the tests that need no DALI."""
    run_tests(results, [path for path in files() if DALI not in path])


def dali_tests(results: Results) -> None:
    """Run the tests of DALI on the GPU."""
    run_tests(results, [path for path in files() if DALI in path])


def run_tests(results: Results, paths: Sequence[str]) -> None:
    """Report a row for each test of these files; tiny runs take only the first two functions."""
    plugin = ForkedTests(results)
    exit_code = pytest.main([*OPTIONS, *paths], plugins=[plugin])
    if not plugin.ran:
        raise RuntimeError(f"pytest ended with exit code {exit_code} before its first test")


def files() -> list[str]:
    """Return the files with such tests, so that pytest does not import all others."""
    return sorted(
        str(path.relative_to(CHECKOUT))
        for path in (CHECKOUT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text()
    )


class ForkedTests:
    """A pytest plugin that runs the collected tests in forked processes, one for each test function with all its parameters."""

    def __init__(self, results: Results) -> None:
        self.ran = False
        self._results = results
        self._folder = results.settings.work / f"tests_{results.phase}"
        self._folder.mkdir()
        self._file = Path()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests instead of pytest's own loop."""
        settings = self._results.settings
        self.ran = True
        with self._results.row("collection") as row:
            row["tests"] = len(session.items)
            if session.testsfailed or not session.items:
                row["error"] = f"{session.testsfailed} errors in {len(session.items)} tests"
        functions: dict[str, list[pytest.Item]] = {}
        for item in session.items:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
        chosen = dict(list(functions.items())[: TINY_FUNCTIONS if settings.tiny else None])
        forks = {name: partial(self._run, items, self._file_of(name)) for name, items in chosen.items()}
        limit_s = settings.left_s() if settings.tiny else TEST_LIMIT_S
        at_once = 1 if settings.tiny else AT_ONCE
        for name, ended in run_forked(forks, lambda _: min(limit_s, settings.left_s()), at_once):
            self._report(chosen[name], self._file_of(name), ended)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of a part of a test (set-up, call, teardown), in the process that runs it."""
        if report.when == "call" or report.outcome != "passed":
            with self._file.open("a") as file:
                fields = {"test": report.nodeid, "outcome": report.outcome, "duration_s": report.duration}
                file.write(json.dumps(fields | {"text": report.longreprtext[-2500:]}) + "\n")

    def _file_of(self, name: str) -> Path:
        return self._folder / (name.replace("/", ".").replace("::", ".") + ".jsonl")

    def _run(self, items: Sequence[pytest.Item], file: Path) -> None:
        """Run the tests of one function, in a process of their own."""
        self._file = file
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def _report(self, items: Iterable[pytest.Item], file: Path, ended: Ended) -> None:
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        for item in items:
            with self._results.row(item.nodeid) as row:
                row |= outcome_of([line for line in lines if line["test"] == item.nodeid], ended)


def outcome_of(parts: Sequence[dict[str, Any]], ended: Ended) -> dict[str, Any]:
    """Return `outcome` (passed, skipped, failed, or how the process ended), and `error` of a test that failed."""
    if not parts:
        return {"outcome": ended.outcome, "error": f"{ended.outcome}\n{ended.output[-2500:]}"}
    fields: dict[str, Any] = {"duration_s": round(sum(part["duration_s"] for part in parts), 2)}
    outcomes = [part["outcome"] for part in parts]
    worst = next(outcome for outcome in ("failed", "skipped", "passed") if outcome in outcomes)
    text = next(part["text"] for part in parts if part["outcome"] == worst)
    if worst == "failed":
        causes = [line for line in text.splitlines() if line.startswith("E  ")]
        fields["error"] = f"{causes[0][1:].strip() if causes else text.splitlines()[-1]}\n{text}"
    if worst == "skipped":
        fields["skipped"] = text
    return {"outcome": worst, **fields}

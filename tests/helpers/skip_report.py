"""A pytest plugin that lists what did not run, because a pass on a small machine covers less.

At the end of a run it lists every skipped test with its reason, and the GPU tests that were deselected. FORBID_SKIPS=1
in the environment makes a run with any skipped test fail. Use it on machines that have everything installed.
"""

import os
from collections import Counter
from collections.abc import Sequence

import pytest

TITLE = "SKIPPED (not run on this machine)"


class SkipReport:
    """A collector of skips that prints a summary at the end of the run."""

    def __init__(self) -> None:
        self.reasons: list[tuple[str, str]] = []
        """(test or file, reason), in order of arrival."""
        self.left_out: Counter[str] = Counter()
        """Deselected tests by marker."""

    @property
    def forbidden(self) -> bool:
        """Return whether the run must fail: FORBID_SKIPS=1 is set and a test was skipped."""
        return os.environ.get("FORBID_SKIPS") == "1" and bool(self.reasons)

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Record a skip; an expected failure is reported as a skip too, but it did run."""
        if report.skipped and not hasattr(report, "wasxfail"):
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons.append((report.nodeid, text.removeprefix("Skipped: ")))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a skipped test or setup."""
        self.note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record a file that was skipped on import."""
        self.note(report)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Count the tests that `-m` deselected."""
        for item in items:
            if marker := next((name for name in ("gpu", "fake_gpu", "slow") if item.get_closest_marker(name)), None):
                self.left_out[marker] += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a run that would have passed if FORBID_SKIPS=1 and a test was skipped."""
        if self.forbidden and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the summary."""
        lines = [f"{test}: {reason}" for test, reason in self.reasons]
        if self.left_out["gpu"]:
            lines.append(f"{self.left_out['gpu']} GPU tests: {gpu_line()}")
        if self.left_out["fake_gpu"]:
            lines.append(
                f"{self.left_out['fake_gpu']} tests on the fake GPU: left out by -m; make test-fake-gpu runs them"
            )
        if self.left_out["slow"]:
            lines.append(f"{self.left_out['slow']} slow tests: left out by -m; make test runs them")
        if not lines:
            return
        terminalreporter.section(TITLE, sep="=", yellow=True, bold=True)
        for line in lines:
            terminalreporter.line(line)
        if self.forbidden:
            terminalreporter.line(
                f"FORBID_SKIPS=1 and {len(self.reasons)} skipped: this run FAILS", red=True, bold=True
            )


def gpu_line() -> str:
    """Return why the GPU tests did not run, and how to run them."""
    # Imported here: a run that skips nothing need not wait for torch.
    import torch

    if torch.cuda.is_available():
        return "left out by -m; make test-gpu runs them here"
    return "there is no CUDA device here; run make test-gpu on a machine that has one"


def pytest_configure(config: pytest.Config) -> None:
    """Register one collector per run."""
    config.pluginmanager.register(SkipReport(), "skip-report-collector")

"""A pytest plugin that says aloud what was not run: a green run on a small machine is less than a green run.

At the end of a run it lists every skipped test with its reason, and the GPU tests that were left out. FORBID_SKIPS=1 in
the environment turns a run with any skipped test into a failed one: for machines where everything should be there.
"""

import os
from collections import Counter
from collections.abc import Sequence

import pytest

TITLE = "SKIPPED (not run on this machine)"


class SkipReport:
    """Collects during the run, prints at its end."""

    def __init__(self) -> None:
        self.reasons: list[tuple[str, str]] = []
        """(test or file, reason), as they come."""
        self.left_out: Counter[str] = Counter()
        """Deselected tests by marker."""

    @property
    def forbidden(self) -> bool:
        """Has the caller asked that a skip be a failure, and was there one?"""
        return os.environ.get("FORBID_SKIPS") == "1" and bool(self.reasons)

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Remember a skip. An expected failure is reported as a skip too, but it did run."""
        if report.skipped and not hasattr(report, "wasxfail"):
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons.append((report.nodeid, text.removeprefix("Skipped: ")))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test, or its setup, skipped."""
        self.note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A whole file skipped while it was imported."""
        self.note(report)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Tests that `-m` left out."""
        for item in items:
            if marker := next((name for name in ("gpu", "fake_gpu", "slow") if item.get_closest_marker(name)), None):
                self.left_out[marker] += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Under FORBID_SKIPS=1 a run that would have passed fails."""
        if self.forbidden and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The block at the end."""
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
    """Why the GPU tests did not run, and what would."""
    import torch  # late: a run that leaves nothing out need not wait for it

    if torch.cuda.is_available():
        return "left out by -m; make test-gpu runs them here"
    return "there is no CUDA device here; run make test-gpu on a machine that has one"


def pytest_configure(config: pytest.Config) -> None:
    """One collector a run."""
    config.pluginmanager.register(SkipReport(), "skip-report-collector")

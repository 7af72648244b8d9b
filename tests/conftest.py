"""Fixtures and marks for all tests."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.fake_gpu.counters import is_loaded as fake_gpu_is_loaded

pytest_plugins = ["tests.helpers.skip_report", "tests.helpers.slurm_cluster"]

# Nothing under test may reach the network.
os.environ.setdefault("WANDB_MODE", "offline")

# Two threads of torch wait for each other in a busy loop, which takes their cores from whatever else runs: other tests, or
# other ranks of the same job. libgomp reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# How long an example takes says nothing on a machine that is shared.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(autouse=True)
def _ordinary_priority() -> Iterator[None]:
    """Fail a test that leaves the process with another scheduling policy.

    A real-time process starves every other process. Some video encoders ask for real-time scheduling.
    """
    yield
    policy = os.sched_getscheduler(0)
    if policy != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        pytest.fail(
            f"the test left the process with the scheduling policy {policy}, which all that it starts would inherit"
        )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run a test on one torch thread.

    Multi-threaded sums need not repeat to the bit. On a busy machine a tiny convolution is ten times slower on two
    threads.
    """
    # Imported here because torch is slow to import and few tests need it.
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` without a CUDA device, and tests marked `fake_gpu` without the fake GPU."""
    if fake_gpu_is_loaded():
        wanted, reason = "fake_gpu", "a GPU that computes nothing is no place for it"
    elif not any(item.get_closest_marker("gpu") or item.get_closest_marker("fake_gpu") for item in items):
        return
    else:
        wanted, reason = "gpu", "it runs on the fake GPU (make test-fake-gpu)"
    import torch

    for item in items:
        marks = {name for name in ("gpu", "fake_gpu") if item.get_closest_marker(name)}
        if not marks:
            continue
        if wanted not in marks:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))

"""What every test shares."""

import os
from collections.abc import Iterator

import pytest

pytest_plugins = ["skip_report"]

# Nothing under test may reach the network.
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def _ordinary_priority() -> Iterator[None]:
    """No test may leave the process with another scheduling policy: a real-time one starves every other process (some video
    encoders ask for it)."""
    yield
    policy = os.sched_getscheduler(0)
    if policy != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        pytest.fail(
            f"the test left the process with the scheduling policy {policy}, which all that it starts would inherit"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip, with a reason, where there is no CUDA device."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))

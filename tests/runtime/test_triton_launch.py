"""Use Triton where it can launch; elsewhere fall back to torch with a warning that names the fix."""

import importlib.util
from collections.abc import Iterator

import pytest

from distributed.batch_norm import messages
from distributed.batch_norm import synchronized_cuda as synchronized_norm_cuda
from runtime.triton_launch import triton_can_launch
from tsm import shift


@pytest.fixture(autouse=True)
def _asked_again() -> Iterator[None]:
    """Clear the caches, so that each test decides again as a new process does."""
    caches = (triton_can_launch, shift._fused_shift, synchronized_norm_cuda.message_kernels)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def driver_of_triton(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """Emulate a machine on which Triton's driver starts, or fails with `error`."""
    triton = pytest.importorskip("triton")

    class Driver:
        @staticmethod
        def get_current_target() -> None:
            if error is not None:
                raise error

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver, raising=False)
    monkeypatch.setattr(type(triton.runtime.driver), "active", Driver, raising=False)


def test_without_triton_torchs_operators_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not triton_can_launch()
    assert shift._fused_shift() is None
    assert synchronized_norm_cuda.message_kernels() is messages


def test_triton_that_cannot_launch_is_warned_of_once_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    driver_of_triton(monkeypatch, FileNotFoundError("no C compiler"))
    with pytest.warns(UserWarning, match=r"Triton cannot launch.*no C compiler.*Fix: install a C compiler"):
        assert not triton_can_launch()
    assert shift._fused_shift() is None
    assert synchronized_norm_cuda.message_kernels() is messages


def test_where_triton_can_launch_its_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    driver_of_triton(monkeypatch, None)
    from distributed.batch_norm import messages_triton
    from tsm import shift_triton

    assert shift._fused_shift() is shift_triton.fused_shift
    assert synchronized_norm_cuda.message_kernels() is messages_triton

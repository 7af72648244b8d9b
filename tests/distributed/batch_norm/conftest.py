"""Fixtures for tests of batch norm over ranks."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from distributed.batch_norm import messages as messages_torch


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """`messages_triton` with its kernels in Triton's interpreter, which takes CPU tensors."""
    pytest.importorskip("triton")
    path = Path(messages_torch.__file__).with_name("messages_triton.py")
    spec = importlib.util.spec_from_file_location("distributed.batch_norm.messages_interpreted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # Triton reads the variable when a kernel is decorated.
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["torch", "triton"])
def messages(request: pytest.FixtureRequest) -> ModuleType:
    return request.getfixturevalue("interpreted") if request.param == "triton" else messages_torch

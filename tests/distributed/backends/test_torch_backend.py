"""The torch backend passes DistributedDataParallel the arguments of each torch version that pyproject.toml allows."""

import inspect
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from distributed.backends.ddp import without_buffer_sync


def of_torch_2_11(module: Any, broadcast_buffers: bool = True) -> None:
    """Signature with the old name only."""


def of_torch_2_14(
    module: Any, broadcast_buffers: bool | None = None, *, forward_sync_buffers: bool | None = None
) -> None:
    """Signature with both names; torch warns about the old one."""


def test_buffers_are_left_alone_under_the_name_that_this_torch_knows() -> None:
    assert without_buffer_sync(of_torch_2_11) == {"broadcast_buffers": False}
    assert without_buffer_sync(of_torch_2_14) == {"forward_sync_buffers": False}


def test_the_installed_torch_takes_the_argument() -> None:
    (name,) = without_buffer_sync()
    assert name in inspect.signature(DistributedDataParallel.__init__).parameters

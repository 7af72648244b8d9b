"""Objects that a process keeps until it ends, such as the modules that it imports. Imports nothing that takes time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_objects() -> Iterator[None]:
    """What is made within is never looked at by Python's collector of cycles, while it is made or later.

    To import torch and what a job needs of it makes 380,000 objects. The collector took a third of a process' 4 s of start and
    end to look for garbage among them, and takes 0.2 s for each full collection behind, for which all other ranks wait. A process
    that is forked shares them as long as nobody touches them.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

"""Keep imported modules out of the cyclic garbage collector's work. Imports only what every Python has loaded already."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_imports() -> Iterator[None]:
    """Disable the cyclic GC while importing, then `gc.freeze()`, so that no later collection scans the imported modules.

    Importing torch and what a job needs of it makes 380,000 objects. Scanning them took a third of the 4 s that a process
    needs to start and end, and takes 0.2 s in each later full collection, for which all other ranks wait. Forked workers
    share the memory of the frozen objects, which no collection touches.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

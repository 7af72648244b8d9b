"""What the process that loader workers are forked from imports, once for all of them."""

from runtime.gc_freeze import frozen_imports

with frozen_imports():
    from . import worker_loader  # noqa: F401

"""The modules that the fork server of the loader workers imports, once for all workers."""

from runtime.gc_freeze import frozen_imports

with frozen_imports():
    from . import clips, worker_loader  # noqa: F401

"""What the process that loader workers are forked from imports, once for all of them."""

from .lasting import lasting_objects

with lasting_objects():
    from . import loader  # noqa: F401

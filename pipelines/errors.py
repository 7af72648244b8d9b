"""Errors about clips: those that cannot be used, and those that cannot be read now."""


class BadClip(ValueError):
    """A clip that cannot be decoded; the message names its file and the reason."""


class MissingClip(BadClip):
    """A clip whose file does not exist."""


class StorageFault(RuntimeError):
    """The file system fails to read a clip, which may be good; a restart, perhaps on other nodes, may succeed."""

"""Errors about clips that cannot be used."""


class BadClip(ValueError):
    """A file that cannot be trained on; the message names it and says why."""


class MissingClip(BadClip):
    """A file that is not there."""

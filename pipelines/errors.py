"""BadClip and MissingClip: errors about clips that cannot be used."""


class BadClip(ValueError):
    """A clip that cannot be decoded; the message names its file and the reason."""


class MissingClip(BadClip):
    """A clip whose file does not exist."""

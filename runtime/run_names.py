"""Names that a run folder may have."""

_QUOTES = "'\""


def why_no_folder_name(name: str, most: int = 128) -> str:
    """Return why no run folder may have this name, or an empty text if it may.

    A name is a folder of `outputs`, a value on the command lines of Python and of batch scripts, and a word in their logs.
    """
    if not name or name in (".", ".."):
        return "it names no folder"
    if "/" in name or "\\" in name:
        return "it has a slash"
    if not name.isprintable():
        return "it has characters that cannot be printed"
    if name != name.strip():
        return "it begins or ends with a blank"
    if name[0] in "-.~" or name[0] in _QUOTES:
        return f"it begins with {name[0]}"
    if name in ("null", "???"):
        return "it means no value"
    if len(name) > most or len(name.encode()) > 200:
        return f"it is longer than {most} characters"
    return ""

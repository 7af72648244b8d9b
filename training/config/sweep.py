"""Translate overrides to Hydra's grammar, for what Hydra composes itself: sweeps, and `--cfg`."""

import re
from collections.abc import Sequence
from pathlib import Path

from .keys import type_of
from .overrides import Override, check_option, escaped, override_of, read_overrides, text_value, unquoted

_OF_HYDRA = re.compile(r"[+~]*hydra[./]")
_FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag)\(.*\)", re.DOTALL)
_COMMA = re.compile(r""",(?=(?:[^'"]|'[^']*'|"[^"]*")*$)""")


def overrides_for_hydra(typed: Sequence[str], sweep: bool, folders: Sequence[Path]) -> list[str]:
    """Return the overrides in Hydra's grammar, so that it takes text as typed. Raises ConfigError as read_overrides() does.

    In a sweep, commas outside quotes separate values, and Hydra's functions such as choice(a,b) work for every key.
    """
    settings = [text for text in typed if _OF_HYDRA.match(text)]
    given = read_overrides([text for text in typed if not _OF_HYDRA.match(text)])
    return settings + [_translated(override, sweep, folders) for override in given.all]


def _translated(override: Override, sweep: bool, folders: Sequence[Path]) -> str:
    key, text = override.key, override.text
    if (sweep and _FUNCTION.fullmatch(text)) or (not override.is_group and type_of(key) is not str):
        return f"{key}={text}"
    values = []
    for part in _COMMA.split(text) if sweep else [text]:
        if override.is_group:
            check_option(override, unquoted(part), folders)
            values.append("null" if part == "null" else _quoted(unquoted(part)))
        else:
            value = text_value(key, part)
            values.append("null" if value is None else _quoted(escaped(value)))
    return f"{key}={','.join(values)}"


def _quoted(text: str) -> str:
    return override_of("", text)[1:]

"""The known keys of the configuration, their types, and the key or word nearest to a misspelt one."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from difflib import SequenceMatcher
from itertools import takewhile
from operator import attrgetter
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from .schema import Config

SECTIONS: dict[str, Any] = {name: hint for name, hint in get_type_hints(Config).items() if is_dataclass(hint)}

GROUPS = (
    "model",
    "data",
    "pipeline",
    "optimizer",
    "schedule",
    "numerics",
    "distributed",
    "logger",
    "evaluation",
    "cluster",
)
"""Sections with options to choose from: GROUP=OPTION selects conf/GROUP/OPTION.yaml."""

EXPERIMENT = "experiment"
"""The group whose options override all sections."""

KEYS: dict[str, Any] = {
    key: hint
    for name, of_name in get_type_hints(Config).items()
    for key, hint in (
        ((f"{name}.{inner}", kind) for inner, kind in get_type_hints(SECTIONS[name]).items())
        if name in SECTIONS
        else [(name, of_name)]
    )
}
"""Every key by its dotted name, with its type."""

RENAMED_KEYS = {
    "distributed.wire": "distributed.gradient_dtype",
    "distributed.hang_s": "distributed.hang_timeout_s",
}
"""Old and new names of renamed keys. Overrides and run folders may still use the old ones."""

REMOVED_KEYS = ("plan.published_step_s",)
"""Keys that nothing reads any more. Run folders may still have them."""

_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def leaves(nested: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each value that is no mapping itself."""
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def is_optional(key: str) -> bool:
    """Return whether null is a value of the key."""
    return type(None) in get_args(KEYS[key])


NUMBER_OR_WORD = ("batch.micro_batch",)
"""Keys of type text whose values are numbers or a word, so that a number needs no quotes in YAML."""


def type_of(key: str) -> Any:
    """Return the key's type, without None."""
    kinds = [kind for kind in get_args(KEYS[key]) if kind is not type(None)]
    return kinds[0] if is_optional(key) else KEYS[key]


def default_of(key: str) -> Any:
    """Return the key's default in the schema, or None if it has none."""
    value = attrgetter(key)(Config())
    return None if value == MISSING else value


def describe_type(key: str) -> str:
    """Return the values that the key takes, in words."""
    words = _KINDS.get(type_of(key), "a list, such as [a,b]")
    if get_origin(type_of(key)) is dict:
        words = "a mapping, which a file of conf/cluster gives"
    if get_args(type_of(key)) == (list[str],):
        words = "a list of lists, such as [[a,b],[c,d]]"
    return words + (" or null" if is_optional(key) else "")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word that is most like `word`. The last part of dotted words counts twice."""
    section, _, name = word.rpartition(".")

    def likeness(candidate: str) -> float:
        of_section, _, of_name = candidate.rpartition(".")
        return 2 * _ratio(name, of_name) + (_ratio(section, of_section) if section else 0)

    return max(known, key=lambda candidate: (likeness(candidate), _common(candidate, word)))


def _ratio(a: str, b: str) -> float:
    return SequenceMatcher(None, a.lower(), b.lower()).ratio()


def _common(a: str, b: str) -> int:
    """Return the number of characters with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def fix_unknown(key: str) -> str:
    """Return the fix for an unknown key: the nearest known one."""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        start = ".".join(parts[:length])
        if start in KEYS:
            return f"{start} has no keys of its own. Fix: {start}=VALUE"
    if key in SECTIONS:
        names = ", ".join(name for name in KEYS if name.startswith(f"{key}."))
        return f"{key} is a section. Fix: set one of its keys: {names}"
    found = nearest(key, (*KEYS, *GROUPS, EXPERIMENT))
    return f"Fix: the nearest known key is {found}; all are in training/config/schema/"

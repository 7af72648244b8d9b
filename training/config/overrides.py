"""Read overrides, KEY=VALUE or GROUP=OPTION, as the user typed them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runtime.checkout import CHECKOUT
from training.errors import ConfigError

from .keys import EXPERIMENT, GROUPS, KEYS, RENAMED_KEYS, describe_type, fix_unknown, is_optional, nearest, type_of

CONF = CHECKOUT / "conf"
MISSING = "???"
"""OmegaConf's mark of a key without a value."""


@dataclass(frozen=True)
class Override:
    """One override: its known key or group, and the text of its value."""

    typed: str
    key: str
    text: str

    @property
    def is_group(self) -> bool:
        return self.key in GROUPS or self.key == EXPERIMENT


@dataclass(frozen=True)
class Overrides:
    """The overrides of one command line, in its order: for each key the last one counts."""

    all: list[Override]
    notes: list[str]
    """What the user should know of: renamed keys."""

    @property
    def groups(self) -> list[Override]:
        return [override for override in self.all if override.is_group]

    @property
    def values(self) -> list[Override]:
        return [override for override in self.all if not override.is_group]


def read_overrides(typed: Sequence[str]) -> Overrides:
    """Read the overrides. Raises ConfigError for one that no known key or group takes.

    `+KEY=VALUE` and `++KEY=VALUE` mean KEY=VALUE: an override changes or confirms a known key, it never adds one.
    """
    overrides, renamed = [], {}
    for text in typed:
        override, old = _read(text)
        overrides.append(override)
        if old:
            renamed[old] = override.key
    for old, new in renamed.items():
        for override in overrides:
            if override.key == new and not re.match(rf"\+*{re.escape(old)}=", override.typed):
                raise ConfigError(f"{old} is the old name of {new}, and both are given. Fix: leave out {old}")
    return Overrides(overrides, [f"note: {old} is now called {new}" for old, new in renamed.items()])


def _read(typed: str) -> tuple[Override, str | None]:
    """Read one override. Returns it with its key's old name, if that was used."""
    key, equals, text = typed.lstrip("+").partition("=")
    if key.startswith(("hydra.", "hydra/")):
        raise ConfigError(f"{typed} is a setting of Hydra, which only --multirun reads. Fix: leave it out")
    if key.startswith("~"):
        key = key.lstrip("~")
        fix = f"leave it out, or {key}=VALUE" if key in KEYS or key in GROUPS else "leave it out"
        raise ConfigError(f"{typed} would delete a key, and every key needs a value. Fix: {fix}")
    if not equals:
        raise ConfigError(
            f"{typed!r} is no override. Fix: KEY=VALUE, such as {nearest(key, (*KEYS, EXPERIMENT))}=VALUE"
        )
    old = key if key in RENAMED_KEYS else None
    override = Override(typed, RENAMED_KEYS.get(key, key), text)
    if override.key not in KEYS and not override.is_group:
        raise ConfigError(f"{typed}: there is no key {key!r}. {fix_unknown(key)}")
    return override, old


# --- Text -------------------------------------------------------------------------------------------------------------


def text_value(key: str, text: str) -> str | None:
    """Return the value of a key of type text: what was typed, whatever its characters mean elsewhere.

    Quotes around the whole value are removed, as in Hydra's grammar. null without quotes is None.
    """
    value: str | None = unquoted(text)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{key}={text!a} is no UTF-8, and cannot be written to config.yaml. Fix: another name")
    if value == MISSING:
        raise ConfigError(f"{key}={text} is Hydra's mark of a missing value. Fix: {key}=VALUE")
    if text == "null":
        if not is_optional(key):
            raise ConfigError(
                f"{key}=null: {key} needs a value. Fix: leave it out, or {override_of(key, 'null')} for the word"
            )
        value = None
    return value


def unquoted(text: str) -> str:
    """Return the text without quotes around all of it."""
    if len(text) >= 2 and text[0] in "'\"" and text[-1] == text[0]:
        try:
            value = OverridesParser.create().parse_rule(f"key={text}", "override")._value
        except HydraException:
            return text
        if isinstance(value, QuotedString):
            return value.text
    return text


def override_of(key: str, text: str) -> str:
    """Return the override that gives the key of type text exactly this value."""
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def escaped(text: str) -> str:
    """Return the text as OmegaConf takes it: no `${...}` in it is an interpolation."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


# --- Application ------------------------------------------------------------------------------------------------------


def apply(config: DictConfig, override: Override) -> None:
    """Set the override's key in the configuration. Raises ConfigError for a value that its type does not allow."""
    key = override.key
    before = OmegaConf.select(config, key, throw_on_resolution_failure=False)
    try:
        OmegaConf.update(config, key, _value(override))
    except OmegaConfBaseException as error:
        fix = "VALUE" if before is None or isinstance(before, DictConfig) else _written(before)
        raise ConfigError(f"{override.typed}: {key} must be {describe_type(key)}. Fix: {key}={fix}") from error


def _value(override: Override) -> Any:
    key, kind = override.key, type_of(override.key)
    if kind is str:
        text = text_value(key, override.text)
        return None if text is None else escaped(text)
    fix = f"Fix: {key} takes {describe_type(key)}; quote words with special characters"
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={override.text}")
    except HydraException as error:
        raise ConfigError(f"{override.typed}: cannot read this value. {fix}") from error
    if parsed.is_sweep_override():
        raise ConfigError(f"{override.typed}: several values are for --multirun. {fix}")
    value = parsed.value()
    if kind is bool and not isinstance(value, bool):
        raise ConfigError(f"{override.typed}: {key} must be true or false. Fix: {key}=true, or {key}=false")
    if get_args(kind) in ((str,), (list[str],)) and (found := _first_number(value)) is not None:
        raise ConfigError(f"{override.typed}: {found} is no text to Hydra. Fix: quote it, as in ['{found}']")
    return value


def _first_number(value: Any) -> object:
    """Return the first element of nested lists that is no string, or None."""
    for element in value if isinstance(value, list) else []:
        found = _first_number(element) if isinstance(element, list) else None if isinstance(element, str) else element
        if found is not None:
            return found
    return None


def _written(value: Any) -> str:
    """Return a value as it is written on the command line."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return str(plain).replace(" ", "").replace("True", "true").replace("False", "false")


# --- Groups -----------------------------------------------------------------------------------------------------------


def options_of(group: str, folders: Sequence[Path]) -> list[str]:
    """Return the options of a group in these folders of configuration files."""
    found = {
        path.relative_to(folder / group).with_suffix("").as_posix()
        for folder in folders
        for path in (folder / group).rglob("*.yaml")
    }
    return sorted(found)


def check_option(override: Override, option: str, folders: Sequence[Path]) -> None:
    """Raise ConfigError unless the option is one of the group's."""
    if override.key == EXPERIMENT and option == "null":
        return
    options = options_of(override.key, folders)
    if option not in options:
        found = nearest(option, options)
        raise ConfigError(
            f"{override.typed}: {override.key} has no option {option!r}, only {', '.join(options)}. Fix: {override.key}={found}"
        )

"""Text stays as typed: on the command line, through Hydra's grammar in a sweep, and through config.yaml."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from training.config.compose import compose, composed
from training.config.keys import KEYS, is_optional, nearest, type_of
from training.config.load import from_composed, read_config
from training.config.overrides import apply, override_of, read_overrides, text_value
from training.config.sweep import overrides_for_hydra
from training.errors import ConfigError
from training.runs.run_folder import RunFolder

AS_TYPED = [
    "20240101_1200", "1_000", "1e3", "007", "true", "off", "2024", "0x10", "1.", ".5", "-1", "nan", "inf", "~", "1:30", "=", "a=b",
    "/x/lr=0.1/epoch=3-step=100.ckpt", "a b", " a ", "a,b", "$HOME", "${x}", "\\${x}", "${oc.env:HOME}", "{a: 1}", "[a,b]", "(a)",
    "f(x)", "a#b", "# a", "a: b", "@a", "a@b:c", "a\\=b", "\\", "a\\", "'", '"', "a'b", "'a", "'a'b", "it's", "Läufe/日本", "%s",
    "*", "?", "!a", "&a", "|", ">", "- a", "---", "a\tb", "NULL", "None", "Null", "???a", "choice(a,b)", "<<", "2024-01-01",
]  # fmt: skip
"""Texts that mean something else in Hydra's grammar, YAML or OmegaConf."""

PRINTABLE = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=30)


@cache
def smoke() -> Any:
    return composed(["experiment=smoke"])


def set_to(override: str) -> str:
    """Return data.root after this override of it."""
    config = smoke()
    (read,) = read_overrides([override]).all
    apply(config, read)
    return str(config.data.root)


def is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] in "'\"" and text[0] == text[-1]


@given(PRINTABLE)
@settings(max_examples=150)
@example("'a'")
@example("\\'${x}\\\\")
@example("null")
def test_a_quoted_override_gives_its_text(text: str) -> None:
    if text != "???":
        assert set_to(override_of("data.root", text)) == text


@given(PRINTABLE)
@settings(max_examples=150)
def test_text_without_quotes_stays_as_typed(text: str) -> None:
    if not is_quoted(text) and text not in ("null", "???"):
        assert set_to(f"data.root={text}") == text


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_with_a_meaning_elsewhere_stays_as_typed(text: str) -> None:
    assert set_to(f"data.root={text}") == text
    assert from_composed(smoke()).data.root == text
    assert set_to(override_of("data.root", text)) == text


@given(st.one_of(PRINTABLE, st.sampled_from(AS_TYPED)))
@settings(max_examples=150)
def test_hydra_takes_the_same_text_in_a_sweep(text: str) -> None:
    if is_quoted(text) or text in ("null", "???"):
        return
    (override,) = overrides_for_hydra([f"name={text}"], sweep=False, folders=[])
    config = OmegaConf.create({"name": ""})
    OmegaConf.update(config, "name", OverridesParser.create().parse_override(override).value())
    assert config.name == text


@pytest.mark.parametrize("key", [key for key in KEYS if type_of(key) is str])
def test_every_text_key_is_taken_as_typed(key: str) -> None:
    assert text_value(key, "1_000") == "1_000"
    assert text_value(key, "'null'") == "null"
    if is_optional(key):
        assert text_value(key, "null") is None
    else:
        with pytest.raises(ConfigError, match=rf"{key}=null.*Fix: leave it out"):
            text_value(key, "null")


def test_text_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(ConfigError, match="no UTF-8"):
        set_to("data.root=/data/\udcfc")


def test_texts_survive_config_yaml(tmp_path: Path) -> None:
    config = compose(["experiment=smoke", "logger=disabled", "run_id=run", f"outputs={tmp_path}"])
    config.logger.tags = AS_TYPED
    # Long enough for the YAML writer to break the line.
    config.data.root, config.data.prepare = " ".join(AS_TYPED), "1_000"
    RunFolder(tmp_path / "run").write_config(config)
    assert read_config(tmp_path / "run") == config


@pytest.mark.parametrize(
    ("word", "key"),
    [("model.shfit", "model.shift"), ("shift", "model.shift"), ("lr", "optimizer.lr"), ("data.roots", "data.root")],
)
def test_the_nearest_key(word: str, key: str) -> None:
    assert nearest(word, KEYS) == key

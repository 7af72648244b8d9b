"""The success marker: a run is complete with its recipe, not by a file alone."""

from pathlib import Path

import pytest

from tests.training.test_recipe import recipe
from training.errors import ConfigError
from training.runs.success import is_complete, write_success

DONE = recipe(total_steps=100)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    write_success(tmp_path / "SUCCESS", DONE)
    return tmp_path / "SUCCESS"


def test_a_run_without_a_marker_is_not_complete(tmp_path: Path) -> None:
    assert not is_complete(tmp_path / "SUCCESS", DONE, 100)


@pytest.mark.parametrize("checkpoint_step", [100, 50, None])
def test_the_same_recipe_has_nothing_to_do_whatever_happened_to_its_checkpoints(
    marker: Path, checkpoint_step: int | None
) -> None:
    assert is_complete(marker, DONE, checkpoint_step)


def test_a_longer_run_goes_on_from_its_checkpoint(marker: Path) -> None:
    assert not is_complete(marker, recipe(total_steps=200), 100)
    assert is_complete(marker, recipe(total_steps=60), 100)


def test_another_recipe_without_a_checkpoint_is_refused(marker: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"another recipe \(step 100\), and no checkpoint .* Fix: choose another run_id"
    ):
        is_complete(marker, recipe(total_steps=200), None)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_an_old_or_broken_marker_is_complete_up_to_its_checkpoint(marker: Path, text: str) -> None:
    marker.write_text(text)
    assert is_complete(marker, DONE, 100)
    assert not is_complete(marker, recipe(total_steps=200), 100)
    assert is_complete(marker, recipe(total_steps=200), None)

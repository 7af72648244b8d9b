"""The success marker of a run: the step and the recipe that it is complete with, so that a longer run can resume from it."""

import json
from pathlib import Path
from typing import Any

from runtime.atomic_write import write_text
from training.errors import ConfigError
from training.recipe import Recipe


def write_success(marker: Path, recipe: Recipe) -> None:
    """Mark a run as complete. Atomic."""
    write_text(marker, json.dumps({"step": recipe.total_steps, "recipe": recipe.fingerprint}) + "\n")


def is_complete(marker: Path, recipe: Recipe, checkpoint_step: int | None) -> bool:
    """Return whether a run is complete, with this recipe. `checkpoint_step`: step of its newest checkpoint, None without one.

    Recipe and checkpoint agree, or the configuration allows the difference (training.runs.resume). A marker of an earlier
    version is empty: then the run is complete up to its newest checkpoint.

    Raises ConfigError for another recipe if there is no checkpoint to resume from: the run would start again from step 0.
    """
    if not marker.exists():
        return False
    written = _read(marker)
    step, fingerprint = written.get("step", checkpoint_step), written.get("recipe", recipe.fingerprint)
    if checkpoint_step is None and fingerprint != recipe.fingerprint:
        raise ConfigError(
            f"{marker.parent} holds a complete run of another recipe (step {step}), and no checkpoint to resume from. "
            "Fix: choose another run_id"
        )
    return step is None or recipe.total_steps <= step


def _read(marker: Path) -> dict[str, Any]:
    try:
        written = json.loads(marker.read_text() or "{}")
    except ValueError:
        return {}
    return written if isinstance(written, dict) else {}

"""Record every start of a run and how it ended, and refuse to restart a run that makes no progress.

`provenance.json` holds a list with an entry per start. `outcome.json` holds how the newest start ended, if that is known.
"""

import json
import sys
from pathlib import Path
from typing import Any

from runtime import run_layout
from runtime.atomic_write import write_text
from runtime.exit_codes import EXIT_FAILURE, EXIT_REQUEUE
from training.errors import NoProgressError

RESTARTS = 2
"""Restarts allowed at the same step after faults."""

_FAULTS = (EXIT_FAILURE, EXIT_REQUEUE)

STOPPED = "stopped by SIG"
"""Part of the reason of a start that a signal ended before its first step."""


def record_start(provenance: Path, outcome: Path, start: dict[str, Any]) -> None:
    """Append a start, and move the previous start's outcome to its entry. Atomic; for one process."""
    starts = read_starts(provenance, outcome)
    write_text(provenance, json.dumps([*starts, start], indent=1))
    outcome.unlink(missing_ok=True)


def read_starts(provenance: Path, outcome: Path) -> list[dict[str, Any]]:
    """Return all starts, each with `first_step` and, if its outcome is known, `ended`: exit code, reason and time."""
    starts: list[dict[str, Any]] = _read(provenance) or []
    ended = _read(outcome)
    if starts and ended is not None:
        starts[-1]["ended"] = ended
    return starts


def _read(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing, or broken: then it is renamed and a line is printed.

    A crash of the node, or a full disk, may leave an empty file. That must not stop every later start.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        aside = path.with_name(f"{path.name}.broken")
        path.replace(aside)
        print(f"{path} is empty or broken, as after a crash of a node: renamed to {aside.name}", file=sys.stderr)
        return None


def check_progress(provenance: Path, outcome: Path, first_step: int) -> None:
    """Raise NoProgressError if this start would be the third restart at `first_step` after faults.

    Outcomes that a user or a scheduler causes (done, Ctrl-C, a signal before the first step), or that a user has to fix
    (configuration, data), do not count.
    """
    reasons = []
    for start in reversed(read_starts(provenance, outcome)):
        ended = start.get("ended")
        if start.get("first_step") != first_step or not _is_fault(ended):
            break
        reasons.append(ended["reason"] if ended else "no outcome recorded")
    if len(reasons) > RESTARTS:
        shown = "; ".join(reversed(reasons[: RESTARTS + 1]))
        raise NoProgressError(
            f"the last {len(reasons)} starts all began at step {first_step}, and none came as far as a checkpoint: {shown}. "
            f"See {provenance.with_name(run_layout.LOG)}. Fix: that, or checkpoint more often (checkpoint.every_steps), then "
            "start it with checkpoint.allow_no_progress=true"
        )


def _is_fault(ended: dict[str, Any] | None) -> bool:
    if ended is None:
        return True
    return ended["exit_code"] in _FAULTS and STOPPED not in ended["reason"]

"""What each start of a run was made of and how it ended, and an end to starts that lead nowhere.

`provenance.json` holds a list with an entry for each start; `outcome.json` how the newest of them ended, where anybody could say.
"""

import json
from pathlib import Path
from typing import Any

from runtime import run_layout
from runtime.atomic_write import write_text
from runtime.exit_codes import EXIT_FAILURE, EXIT_REQUEUE
from training.errors import NoProgressError

RESTARTS = 2  # that may begin at the same step, as in "two restarts without progress"
_FAULTS = (EXIT_FAILURE, EXIT_REQUEUE, None)  # None: nobody was left to say how it ended


def record_start(provenance: Path, outcome: Path, start: dict[str, Any]) -> None:
    """Add a start, and to the one before it how it ended; one process calls it. Whole or not done, whatever happens."""
    starts = read_starts(provenance, outcome)
    write_text(provenance, json.dumps([*starts, start], indent=1))
    outcome.unlink(missing_ok=True)


def read_starts(provenance: Path, outcome: Path) -> list[dict[str, Any]]:
    """All starts so far, each with `first_step` and, behind its end, `ended`: exit code, reason and time, where known."""
    starts: list[dict[str, Any]] = json.loads(provenance.read_text()) if provenance.exists() else []
    if starts and outcome.exists():
        starts[-1]["ended"] = json.loads(outcome.read_text())
    return starts


def check_progress(provenance: Path, outcome: Path, first_step: int) -> None:
    """Raise NoProgressError where a start at `first_step` would be the third restart there behind faults.

    Ends that a user brings about or has to mend (done, Ctrl-C, configuration, data) do not count.
    """
    in_vain = []
    for start in reversed(read_starts(provenance, outcome)):
        ended = start.get("ended")
        if start.get("first_step") != first_step or (ended["exit_code"] if ended else None) not in _FAULTS:
            break
        in_vain.append(ended["reason"] if ended else "it left no word")
    if len(in_vain) > RESTARTS:
        told = "; ".join(reversed(in_vain[: RESTARTS + 1]))
        raise NoProgressError(
            f"the last {len(in_vain)} starts all began at step {first_step}, and none came as far as a checkpoint: {told}. "
            f"See {provenance.with_name(run_layout.LOG)}. Fix: mend that, or checkpoint more often (checkpoint.every_steps), then "
            "start it with checkpoint.allow_no_progress=true"
        )

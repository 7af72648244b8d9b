"""Tell how a run ended, or that it still runs, from what its folder has. Never changes the folder."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import run_layout
from runtime.exit_codes import EXIT_DONE
from runtime.lease import STALE_AFTER_S, describe, holder_is_gone

from .failures import fatal_signal, last_lines
from .history import History

# As the monitor and a rank write them (distributed.health).
_GONE = re.compile(r"rank (\d+) on (\S+) is gone: ")
_PLACE = re.compile(r"step (\d+), phase ([a-z][a-z ]*)")
_STOPPED = re.compile(r"stopped by (SIG[A-Z0-9]+|a second Ctrl-C)")

_LOG_LINES = 200


@dataclass(frozen=True)
class Status:
    """How a run stands."""

    word: str
    """`finished`, `stopped` (in good order, before its end), `running`, `failed`, `killed` or `not started`."""
    reason: str
    """Why, in a sentence; empty where the word says it all."""
    signal: str | None
    """Name of the signal that ended the run, if one did, or most likely did."""
    place: str | None
    """Where the failing rank was: `step 41, phase step`."""

    @property
    def is_failure(self) -> bool:
        return self.word in ("failed", "killed")


def read_status(folder: Path, history: History) -> Status:
    """Return the status of a run folder. `history`: its records."""
    outcome = read_json(folder / run_layout.OUTCOME)
    if isinstance(outcome, dict) and isinstance(outcome.get("exit_code"), int):
        return _status_of_outcome(folder, history, outcome["exit_code"], str(outcome.get("reason", "")))
    if history.end is not None and isinstance(history.end.get("exit_code"), int):
        # Runs of earlier versions have no outcome.json.
        return _status_of_outcome(folder, history, history.end["exit_code"], "")
    holder = _living_holder(folder / run_layout.LOCK)
    if holder is not None:
        return Status("running", f"by {holder}", None, None)
    if not history.starts and not (folder / run_layout.PROVENANCE).exists():
        return Status("not started", "no start is recorded", None, None)
    return Status(
        "killed",
        "no outcome is recorded: all processes of the job, the monitor too, ended without a word. Most likely its node failed, or "
        "SIGKILL ended all of them (the batch system at the end of the job's time, or kill -9)",
        "SIGKILL",
        None,
    )


def _status_of_outcome(folder: Path, history: History, code: int, reason: str) -> Status:
    if code == EXIT_DONE:
        return Status("finished" if history.ended_whole else "stopped", "", None, None)
    place = _PLACE.search(reason)
    where = place[0].strip() if place else None
    if gone := _GONE.search(reason):
        name, evidence = _signal_of(folder, int(gone[1]))
        return Status("killed", f"{reason}. {evidence}", name, where)
    text = reason if _STOPPED.search(reason) else "\n".join(last_lines(folder / run_layout.LOG, _LOG_LINES))
    stops = _STOPPED.findall(text)
    if stops and ("good order" in reason or not reason or text is reason):
        name = "SIGINT" if stops[-1].startswith("a second") else stops[-1]
        shown = reason if text is reason else f"stopped by {name}: {reason or 'in good order'}"
        return Status("stopped", f"{shown} (exit code {code})", name, where)
    if not reason or "good order" in reason:
        return Status("stopped", f"{reason or 'by its records'} (exit code {code})", None, where)
    return Status("failed", f"{reason} (exit code {code})", None, where)


def _signal_of(folder: Path, rank: int) -> tuple[str, str]:
    """Return the signal that ended a rank's process, and how that is known.

    A process logs every stop signal, and the interpreter's stacks at a crash. SIGKILL is the one that no process can log.
    """
    name = fatal_signal(folder, rank)
    if name is not None:
        return name, f"Its log ends with a fatal error: {name}"
    return (
        "SIGKILL",
        "Its log has no crash and no other signal, so it was SIGKILL, which no process can log (kill -9, the kernel for lack of "
        "memory, the batch system), or its node failed",
    )


def _living_holder(lock: Path) -> str | None:
    """Describe the job that trains in the folder now; None if there is none. A holder elsewhere is judged by the lock's age."""
    try:
        text, age_s = lock.read_text(encoding="utf-8", errors="replace"), time.time() - lock.stat().st_mtime
    except OSError:
        return None
    gone = holder_is_gone(text)
    return describe(text) if gone is False or (gone is None and age_s < STALE_AFTER_S) else None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if there is none, or if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

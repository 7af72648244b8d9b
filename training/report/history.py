"""Read the records of a run folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from runtime.exit_codes import EXIT_DONE
from training.runs.run_folder import RunFolder
from training.schedule import Schedule
from training.telemetry.metrics_log import read_metrics

Record = dict[str, Any]

# A run that a kill set back to its last checkpoint repeats steps, and writes records of these kinds again.
_REPEATED_KINDS = ("train", "evaluation", "checkpoint")


@dataclass(frozen=True)
class History:
    """The records of a run over all its starts. Of a step that was repeated, only the newest record."""

    starts: list[Record]
    train: list[Record]
    evaluation: list[Record]
    checkpoint: list[Record]
    end: Record | None
    """The newest start's end; None while it runs, or if it was killed."""
    duration_s: float
    """Time from start to last record, summed over the starts; without the time in a queue between them."""
    bad_clips: list[Record]

    @classmethod
    def read(cls, folder: RunFolder) -> "History":
        lines = read_metrics(folder.metrics) if folder.metrics.exists() else []
        records = [line for line in lines if isinstance(line, dict) and line.keys() >= {"kind", "time_s", "step"}]
        newest = _newest(records)
        ends = [record for record in records if record["kind"] in ("start", "end")]
        bad_clips = read_metrics(folder.bad_clips) if folder.bad_clips.exists() else []
        # An undecodable clip is listed in each epoch, and again when its step is repeated. Count it once.
        distinct = {(record.get("split"), record.get("row")): record for record in bad_clips}
        return cls(
            starts=[record for record in records if record["kind"] == "start"],
            train=newest["train"],
            evaluation=newest["evaluation"],
            checkpoint=newest["checkpoint"],
            end=ends[-1] if ends and ends[-1]["kind"] == "end" else None,
            duration_s=sum(
                max(0.0, after["time_s"] - before["time_s"])
                for before, after in pairwise(records)
                if after["kind"] not in ("job_start", "start")
            ),
            bad_clips=list(distinct.values()),
        )

    @property
    def steps(self) -> int:
        """Number of steps taken, by the records."""
        return max((record["step"] for record in (*self.train, *self.evaluation, *self.checkpoint)), default=0)

    @property
    def status(self) -> str:
        """`finished`, `stopped` (by a signal or max_steps, before the recipe's end), or `no end recorded`."""
        if self.end is None:
            return "no end recorded"
        whole = self.end.get("exit_code") == EXIT_DONE and self.steps >= self.end["step"]
        return "finished" if whole else "stopped"

    @property
    def resumed_at(self) -> list[int]:
        """Steps of the checkpoints that later starts resumed from."""
        return [record["step"] for record in self.starts[1:] if record["step"] > 0]

    @property
    def schedule(self) -> tuple[Schedule, float] | None:
        """Schedule and steps per epoch of the newest start; None if its record is of an older version and has none."""
        newest = self.starts[-1] if self.starts else {}
        fields = newest.get("schedule")
        if not isinstance(fields, dict):
            return None
        schedule = Schedule(**fields | {"milestone_steps": tuple(fields["milestone_steps"])})
        return schedule, newest["steps_per_epoch"]


def values_of(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of the records that have a number under `key`."""
    having = [record for record in records if isinstance(record.get(key), int | float)]
    return [record["step"] for record in having], [float(record[key]) for record in having]


def _newest(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return, for each kind that a resumed run repeats, the newest record of each step, sorted by step."""
    kept: dict[tuple[str, int], Record] = {}
    for record in records:
        if record["kind"] == "start":
            # Steps after the checkpoint that this start resumed from are repeated, or were never taken.
            kept = {key: earlier for key, earlier in kept.items() if key[1] <= record["step"]}
        elif record["kind"] in _REPEATED_KINDS:
            kept[record["kind"], record["step"]] = record
    steps = sorted(kept, key=lambda key: key[1])
    return {kind: [kept[key] for key in steps if key[0] == kind] for kind in _REPEATED_KINDS}

"""Read the records of a run folder."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import run_layout
from runtime.exit_codes import EXIT_DONE
from training.schedule import Schedule
from training.telemetry.records import read_metrics

Record = dict[str, Any]

# A run that a kill set back to its last checkpoint repeats steps, and writes records of these kinds again.
_REPEATED_KINDS = ("train", "evaluation", "checkpoint")

# Records that a start begins with. Older versions wrote `start` only.
_JOB_START, _START = "job_start", "start"


@dataclass(frozen=True)
class History:
    """The records of a run over all its starts. Of a step that was repeated, only the newest record.

    Every record has two more fields than in the file: `number`, from 1, and `elapsed_s`, the run's time until then, without the
    time in a queue between starts. Every training record has `steps`, the number of steps that it covers.
    """

    starts: list[Record]
    train: list[Record]
    evaluation: list[Record]
    checkpoint: list[Record]
    others: list[Record]
    """Records of all other kinds, as written."""
    end: Record | None
    """The newest start's end; None while it runs, or if it was killed."""
    duration_s: float
    """The run's time until its last record, summed over the starts; without the time in a queue between them."""
    bad_clips: list[Record]

    @classmethod
    def read(cls, folder: Path) -> "History":
        records = list(_measured(_lines(folder / run_layout.METRICS)))
        newest = _newest(records)
        ends = [record for record in records if record["kind"] in (_START, "end")]
        # An undecodable clip is listed in each epoch, and again when its step is repeated. Count it once.
        distinct = {
            (record.get("split"), record.get("row")): record for record in _objects(folder / run_layout.BAD_CLIPS)
        }
        return cls(
            starts=[record for record in records if record["kind"] == _START],
            train=newest["train"],
            evaluation=newest["evaluation"],
            checkpoint=newest["checkpoint"],
            others=[record for record in records if record["kind"] not in (*_REPEATED_KINDS, _START)],
            end=ends[-1] if ends and ends[-1]["kind"] == "end" else None,
            duration_s=records[-1]["elapsed_s"] if records else 0.0,
            bad_clips=list(distinct.values()),
        )

    @property
    def steps(self) -> int:
        """Number of steps taken, by the records."""
        return max((record["step"] for record in (*self.train, *self.evaluation, *self.checkpoint)), default=0)

    @property
    def total_steps(self) -> int | None:
        """Number of steps of the whole run, if a record has it."""
        if self.end is not None:
            return int(self.end["step"])
        return None if self.schedule is None else self.schedule[0].total_steps

    @property
    def ended_whole(self) -> bool:
        """True if the newest start has taken the run's last step, and ended well."""
        return self.end is not None and self.end.get("exit_code") == EXIT_DONE and self.steps >= self.end["step"]

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


def _objects(path: Path) -> list[Record]:
    return [line for line in read_metrics(path) if isinstance(line, dict)] if path.exists() else []


def _lines(path: Path) -> list[Record]:
    """Return the records that have what every record has, with numbers where they must be."""
    return [
        line
        for line in _objects(path)
        if line.keys() >= {"kind", "time_s", "step"}
        and isinstance(line["time_s"], int | float)
        and isinstance(line["step"], int)
    ]


def _measured(records: Iterable[Record]) -> Iterable[Record]:
    """Yield the records with the fields that History describes."""
    elapsed_s, before, last_step = 0.0, None, 0
    for number, record in enumerate(records, 1):
        begins = record["kind"] == _JOB_START or (
            record["kind"] == _START and (before is None or before["kind"] != _JOB_START)
        )
        if before is not None and not begins:
            elapsed_s += max(0.0, record["time_s"] - before["time_s"])
        extra: Record = {"number": number, "elapsed_s": elapsed_s}
        if record["kind"] == _START:
            last_step = record["step"]
        elif record["kind"] == "train":
            extra["steps"], last_step = max(0, record["step"] - last_step), record["step"]
        before = record
        yield record | extra


def _newest(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return, for each kind that a resumed run repeats, the newest record of each step, sorted by step."""
    kept: dict[tuple[str, int], Record] = {}
    for record in records:
        if record["kind"] == _START:
            # Steps after the checkpoint that this start resumed from are repeated, or were never taken.
            kept = {key: earlier for key, earlier in kept.items() if key[1] <= record["step"]}
        elif record["kind"] in _REPEATED_KINDS:
            kept[record["kind"], record["step"]] = record
    steps = sorted(kept, key=lambda key: key[1])
    return {kind: [kept[key] for key in steps if key[0] == kind] for kind in _REPEATED_KINDS}

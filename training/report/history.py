"""Read the records of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from runtime.exit_codes import EXIT_DONE
from training.runs.run_folder import RunFolder
from training.telemetry.metrics_log import read_metrics

Record = dict[str, Any]


# What a resumed run takes again when a kill threw it back to its last checkpoint.
_REPEATED_KINDS = ("train", "evaluation", "checkpoint")


@dataclass(frozen=True)
class History:
    """What happened in a run, over all its starts: of a step that was taken twice, the newest record alone."""

    starts: list[Record]
    train: list[Record]
    evaluation: list[Record]
    checkpoint: list[Record]
    end: Record | None
    """How the newest start ended; None while it runs, or when it was killed."""
    duration_s: float
    """Time between start and last record, added up over the starts: waiting in a queue between them is not in it."""
    bad_clips: list[Record]

    @classmethod
    def read(cls, folder: RunFolder) -> "History":
        lines = read_metrics(folder.metrics) if folder.metrics.exists() else []
        records = [line for line in lines if isinstance(line, dict) and line.keys() >= {"kind", "time_s", "step"}]
        newest = _newest(records)
        ends = [record for record in records if record["kind"] in ("start", "end")]
        bad_clips = read_metrics(folder.bad_clips) if folder.bad_clips.exists() else []
        # A clip is undecodable in every epoch, and again when its step is repeated: it is one clip.
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
                if after["kind"] != "start"
            ),
            bad_clips=list(distinct.values()),
        )

    @property
    def steps(self) -> int:
        """Steps taken, as far as records tell."""
        return max((record["step"] for record in (*self.train, *self.evaluation, *self.checkpoint)), default=0)

    @property
    def status(self) -> str:
        """`finished`, `stopped` (in good order, before the recipe's end), or `no end recorded`."""
        if self.end is None:
            return "no end recorded"
        whole = self.end.get("exit_code") == EXIT_DONE and self.steps >= self.end["step"]
        return "finished" if whole else "stopped"


def _newest(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Of each kind that a resumed run repeats, the newest record of each step, in the order of steps."""
    kept: dict[tuple[str, int], Record] = {}
    for record in records:
        if record["kind"] == "start":
            # What lies behind the checkpoint that this start went on from is taken again, or never was.
            kept = {key: earlier for key, earlier in kept.items() if key[1] <= record["step"]}
        elif record["kind"] in _REPEATED_KINDS:
            kept[record["kind"], record["step"]] = record
    steps = sorted(kept, key=lambda key: key[1])
    return {kind: [kept[key] for key in steps if key[0] == kind] for kind in _REPEATED_KINDS}


def _values(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have the key."""
    having = [record for record in records if isinstance(record.get(key), int | float)]
    return [record["step"] for record in having], [float(record[key]) for record in having]

"""Write a run's records as an MLPerf-style log, for tools that read such logs. It is no MLPerf submission.

The format is that of mlcommons/logging (mlperf_logging/mllog): lines of `:::MLLOG ` and a JSON object with namespace, time_ms,
event_type, key, value and metadata. Keys are those of its constants.py where MLPerf has one, else start with `tsm_`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import run_layout
from runtime.atomic_write import write_text

from .history import History, Record
from .status import Status

_START, _STOP, _POINT = "INTERVAL_START", "INTERVAL_END", "POINT_IN_TIME"

# Key of MLPerf, key of the run's configuration.
_HYPERPARAMETERS = (
    ("seed", "seed"),
    ("global_batch_size", "batch.global_batch"),
    ("opt_name", "optimizer.name"),
    ("opt_momentum", "optimizer.momentum"),
    ("opt_weight_decay", "optimizer.weight_decay"),
)


@dataclass(frozen=True)
class _Event:
    time_s: float
    kind: str
    key: str
    value: Any
    record: int
    """Number of the record in metrics.jsonl, from 1."""
    step: int
    epoch: float | None = None

    def line(self) -> str:
        metadata: dict[str, Any] = {"file": run_layout.METRICS, "lineno": self.record, "step": self.step}
        if self.epoch is not None:
            metadata["epoch_num"] = self.epoch
        fields = {
            "namespace": "",
            "time_ms": round(self.time_s * 1000),
            "event_type": self.kind,
            "key": self.key,
            "value": self.value,
            "metadata": metadata,
        }
        return f":::MLLOG {json.dumps(fields)}"


def write_mllog(folder: Path, history: History, status: Status, path: Path) -> int:
    """Write the log of a run that has at least one start, and return its number of lines."""
    # The sort is stable: events of one moment stay in the order in which they are made.
    events = sorted(_events(folder, history, status), key=lambda event: event.time_s)
    write_text(path, "".join(event.line() + "\n" for event in events))
    return len(events)


def _events(folder: Path, history: History, status: Status) -> Iterator[_Event]:
    first = history.starts[0]
    began = next((record for record in history.others if record["kind"] == "job_start"), first)
    yield _of(began, _POINT, "submission_benchmark", f"tsm_{_config_value(folder, 'name') or folder.name}")
    yield _of(began, _POINT, "submission_division", "open")
    yield _of(began, _START, "init_start", None)
    for key, name in _HYPERPARAMETERS:
        if (value := _config_value(folder, name)) is not None:
            yield _of(began, _POINT, key, value)
    yield from _schedule_events(began, history)
    yield _of(first, _STOP, "init_stop", None)
    yield _of(first, _START, "run_start", None)
    for record in history.starts[1:]:
        yield _of(record, _POINT, "tsm_resumed", record["step"])
    for record in history.train:
        yield _of(record, _POINT, "tracked_stats", _numbers(record, "clips_per_s", "loss", "learning_rate"))
    yield from _evaluation_events(first, history)
    last = max((first, *history.train, *history.evaluation, *history.checkpoint, *history.others), key=_time_s)
    yield _of(last, _STOP, "run_stop", None, status="success" if status.word == "finished" else "aborted")


def _schedule_events(began: Record, history: History) -> Iterator[_Event]:
    if history.schedule is None:
        return
    schedule, steps_per_epoch = history.schedule
    yield _of(began, _POINT, "opt_base_learning_rate", schedule.peak)
    yield _of(began, _POINT, "opt_learning_rate_warmup_epochs", schedule.warmup_steps / steps_per_epoch)
    yield _of(began, _POINT, "tsm_total_steps", schedule.total_steps)


def _evaluation_events(first: Record, history: History) -> Iterator[_Event]:
    """Yield a block of training before each evaluation, and the evaluation."""
    block, epochs_before = first, 0.0
    for record in history.evaluation:
        epoch = record.get("epoch")
        began = record | {"time_s": max(_time_s(block), _time_s(record) - (record.get("duration_s") or 0.0))}
        count = None if epoch is None else round(epoch - epochs_before, 3)
        yield _of(block, _START, "block_start", None, first_epoch_num=epochs_before, epoch_count=count)
        yield _of(began, _STOP, "block_stop", None, first_epoch_num=epochs_before, epoch_count=count)
        yield _of(began, _START, "eval_start", None)
        if isinstance(record.get("top1_percent"), int | float):
            yield _of(record, _POINT, "eval_accuracy", record["top1_percent"] / 100)
        yield _of(record, _STOP, "eval_stop", None)
        block, epochs_before = record, epoch if epoch is not None else epochs_before


def _of(record: Record, kind: str, key: str, value: Any, **values: Any) -> _Event:
    """Return an event at the time of a record. `values`: fields of a value that has several."""
    return _Event(_time_s(record), kind, key, values or value, record["number"], record["step"], record.get("epoch"))


def _time_s(record: Record) -> float:
    return float(record["time_s"])


def _numbers(record: Record, *keys: str) -> dict[str, float]:
    # JSON has no NaN.
    return {key: record[key] for key in keys if isinstance(record.get(key), int | float) and record[key] == record[key]}


def _config_value(folder: Path, name: str) -> Any:
    """Return a value of the run's configuration; None if there is none."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return OmegaConf.select(OmegaConf.load(folder / run_layout.CONFIG), name)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return None

"""Metrics that a run logs to wandb, read back from wandb's offline files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.config.test_config import config_of
from training.runs.run_folder import RunFolder, git
from training.telemetry.metrics_log import MetricsLog
from training.telemetry.wandb_log import wandb_arguments

_HEADER_BYTES = 7
_BLOCK_BYTES = 32768


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: protobuf messages in LevelDB's log format, after wandb's own header."""
    from wandb.proto import wandb_internal_pb2

    content, position, message = path.read_bytes(), _HEADER_BYTES, b""
    while position + 7 <= len(content):
        if _BLOCK_BYTES - position % _BLOCK_BYTES < 7:
            position += _BLOCK_BYTES - position % _BLOCK_BYTES
            continue
        # A checksum of 4 bytes, a length, and a kind: full, first, middle or last.
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        if position + 7 + length > len(content):
            return
        message += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(message)
            message = b""
            yield record


def test_a_run_can_be_filtered_by_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    folder = RunFolder(tmp_path / "run-1")
    folder.path.mkdir()
    config = config_of("experiment=smoke", "logger=offline", "logger.tags=[mine,shapes]", "optimizer.lr=0.25")
    records = MetricsLog(config, folder, True, 0, 10)
    records.write("train", 5, time_s=1e9, loss=1.5, clips_per_s=80.0, mfu_percent=None, forward_s=0.25, worst_rank=3)
    records.close(0)

    (path,) = folder.path.glob("wandb/offline-run-*/run-*.wandb")
    written = list(wandb_records(path))
    assert written[-1].WhichOneof("record_type") == "exit"
    runs = [record.run for record in written if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.project, run.run_group, run.job_type) for run in runs} == {
        ("run-1", "tsm", "smoke", "train")
    }
    assert [sorted(run.tags) for run in runs] == [["mine", "resnet18", "shapes"]] * len(runs)
    values = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
    assert values["commit"] == git("rev-parse", "HEAD")
    assert (values["batch"]["global_batch"], values["optimizer"]["lr"]) == (16, 0.25)
    assert (values["model"]["backbone"], values["data"]["name"], values["seed"]) == ("resnet18", "shapes", 0)
    (history,) = [record.history for record in written if record.WhichOneof("record_type") == "history"]
    logged = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
    shown = {name: value for name, value in logged.items() if not name.startswith("_")}
    sections = {"throughput/clips_per_s": 80.0, "phases/forward_s": 0.25, "ranks/worst_rank": 3}
    assert shown == {"train/loss": 1.5} | sections
    metrics = {
        record.metric.name: record.metric.summary for record in written if record.WhichOneof("record_type") == "metric"
    }
    assert metrics["evaluation/top1_percent"].max and metrics["train/loss"].min


def test_every_key_of_the_configuration_is_given() -> None:
    from omegaconf import OmegaConf

    config = config_of("experiment=something_v1")
    given = wandb_arguments(config, "x")["config"]
    expected = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(expected, dict)
    assert {key: given[key] for key in expected} == expected
    # wandb joins nested keys with dots, so a key with a dot would be ambiguous.
    assert not [key for key in given if "." in key]


def test_the_group_can_be_chosen() -> None:
    config = config_of("experiment=smoke", "logger.group=warm-up study", "logger.tags=[resnet18]")
    fields = wandb_arguments(config, "x")
    assert (fields["group"], fields["tags"]) == ("warm-up study", ["resnet18", "shapes"])

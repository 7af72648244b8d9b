"""TensorBoard's events, read back, and a run folder that cannot take them."""

from pathlib import Path

import pytest

from tests.training.config.test_config import config_of
from training.errors import ConfigError
from training.runs.run_folder import RunFolder
from training.telemetry import tensorboard_log
from training.telemetry.metrics_log import MetricsLog
from training.telemetry.tensorboard_log import TensorBoardLog, check_tensorboard

REASON = "needs the package tensorboard (the extra tensorboard; make dev)"


def test_records_become_charts(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=REASON)
    config = config_of("experiment=smoke", "logger=disabled", "logger.tensorboard=true")
    check_tensorboard()
    records = MetricsLog(config, RunFolder(tmp_path), True, 0, 10)
    records.write("train", 5, loss=1.5, clips_per_s=80.0, mfu_percent=None)
    records.write("evaluation", 5, top1_percent=25.0)
    records.close(0)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    charts = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected = {"train/loss": [(5, 1.5)], "throughput/clips_per_s": [(5, 80.0)], "evaluation/top1_percent": [(5, 25.0)]}
    assert charts == expected


def test_a_folder_that_cannot_be_made_ends_no_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason=REASON)
    (tmp_path / "tensorboard").write_text("a file in the folder's place")
    warnings: list[str] = []
    log = TensorBoardLog(tmp_path / "tensorboard", 0, warnings.append)
    log.log([("train/loss", 1.0)], 1)
    log.close()
    assert len(warnings) == 1 and "Training continues" in warnings[0]


def test_without_the_package_the_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard_log, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package tensorboard\. Fix: "):
        check_tensorboard()

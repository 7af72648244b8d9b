"""plan.py calibrate=NAME: the fit, the file that it writes, and a whole calibration on a small network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from distributed.backends.single import SingleBackend
from distributed.topology import Topology
from tests.helpers.clips import smooth_video, write_clips
from tests.training.config.test_config import config_of
from training.calibration import command, measure
from training.calibration.cluster_file import cluster_path, figure, with_base, write_cluster
from training.calibration.fit import exponential_mean_s, fit_step
from training.config.overrides import CONF
from training.errors import ConfigError
from training.planning.on_cluster import cluster_of
from training.planning.simulator.figures import read_cluster


def sampled(c0_s: float, k_s: float, jitter_s: float, seed: int) -> dict[int, list[float]]:
    random = np.random.default_rng(seed)
    return {clips: list(c0_s + k_s * clips + random.exponential(jitter_s, 400)) for clips in (1, 2, 4, 8, 16)}


def test_the_fit_finds_what_times_were_made_of() -> None:
    fitted = fit_step(sampled(0.010, 0.040, 0.004, seed=0))
    assert fitted.k_s == pytest.approx(0.040, rel=0.02)
    assert fitted.c0_s == pytest.approx(0.010, abs=0.001)
    assert fitted.jitter_s == pytest.approx(0.004, rel=0.15)
    assert fitted.worst_error < 0.03
    # Two calibrations of one machine agree.
    assert fit_step(sampled(0.010, 0.040, 0.004, seed=1)).k_s == pytest.approx(fitted.k_s, rel=0.05)


def test_outliers_move_neither_line_nor_jitter() -> None:
    times_s = sampled(0.010, 0.040, 0.004, seed=0)
    for of_size in times_s.values():
        of_size[:20] = [5.0] * 20
    fitted = fit_step(times_s)
    assert fitted.k_s == pytest.approx(0.040, rel=0.03) and fitted.jitter_s < 0.006


def test_a_host_that_limits_small_steps_is_no_part_of_the_line() -> None:
    """The medians of one H200 in bfloat16 (benchmarks/data/first_light_h200.json): from 32 clips on the device is the limit."""
    medians_ms = {1: 37.0, 2: 40.1, 4: 43.5, 8: 45.4, 16: 41.8, 32: 58.8, 64: 113.8}
    fitted = fit_step({clips: [median_ms / 1000] * 3 for clips, median_ms in medians_ms.items()})
    assert fitted.k_s == pytest.approx((0.1138 - 0.0588) / 32, rel=0.01)
    assert 0.037 < fitted.host_s < 0.046 and fitted.c0_s < 0.005
    assert fitted.at_s(8) == fitted.host_s and fitted.at_s(64) == pytest.approx(0.1138)
    # Its TF32 is on a line.
    of_device = fit_step({8: [0.03434] * 3, 16: [0.063732] * 3, 32: [0.12376] * 3, 64: [0.24183] * 3})
    assert (of_device.host_s, of_device.k_s) == (0, pytest.approx(0.00371, rel=0.01))
    assert of_device.worst_error < 0.01


def test_c0_is_never_negative() -> None:
    fitted = fit_step({1: [0.010] * 3, 2: [0.025] * 3, 4: [0.055] * 3})
    assert fitted.c0_s == 0 and 0.010 < fitted.k_s < 0.014
    assert exponential_mean_s([0.010] * 3) == 0


def summit() -> dict[str, Any]:
    figures: dict[str, Any] = yaml.safe_load((CONF / "cluster/summit.yaml").read_text())["figures"]
    return figures


def test_what_is_not_measured_comes_from_the_base(tmp_path: Path) -> None:
    table = {"ranks": 4, "growth": "ring", "bytes": [32_768, 131_072], "seconds": [1.5e-5, 0.25]}
    measured = {
        "achieved_tflop_s": {"float32": figure(1.23e-5, 'a "test"', "measured")},
        "peak_tflop_s": {"float32": figure(4.0, "a test", "guess")},
        "all_reduce": figure(table, "a test", "measured"),
    }
    path = cluster_path(tmp_path, "mine")
    write_cluster(path, "mine", with_base(measured, summit()), "A test.")
    # YAML 1.1 reads 1.23e-05 as text.
    read = read_cluster("mine", yaml.safe_load(path.read_text())["figures"])
    assert read.achieved_tflop_s == {"float32": 1.23e-5}
    assert read.figures["achieved_tflop_s.float32"].source == 'a "test"'
    assert read.all_reduce is not None and read.all_reduce.seconds_P == (1.5e-5, 0.25)
    assert (read["network_gb_s"], read.figures["network_gb_s"].source) == (23, summit()["network_gb_s"]["source"])
    # A second calibration replaces the file.
    assert cluster_path(tmp_path, "mine") == path


def test_a_file_of_another_origin_stays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"summit\.yaml was not written by calibrate.* Fix: another name"):
        cluster_path(CONF / "cluster", "summit")
    for name in ("", "../x", "schema", "My cluster"):
        with pytest.raises(ConfigError, match="Fix: calibrate=my_cluster"):
            cluster_path(tmp_path, name)


def test_a_whole_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clips(tmp_path / "train.arrow", [smooth_video(seed=seed) for seed in range(2)])
    monkeypatch.setattr(command, "CLUSTERS", tmp_path)
    monkeypatch.setattr(measure, "CLIPS", (1, 2))
    monkeypatch.setattr(measure, "STEPS_S", 0.0)
    monkeypatch.setattr(measure, "_WRITTEN_BYTES", 1000)
    config = config_of(
        "experiment=smoke", "plan.calibrate=mine", "model.num_frames=4", "pipeline.size=32", "pipeline.decoder=pyav",
        f"data.root={tmp_path}", "data.num_classes=3", f"outputs={tmp_path}",
    )  # fmt: skip
    command.calibrate(config, SingleBackend(Topology("none", 0, 1, 0, 1, 0, "here"), torch.device("cpu")), 12.5)
    figures = yaml.safe_load((tmp_path / "mine.yaml").read_text())["figures"]
    config.cluster.name, config.cluster.figures = "mine", figures
    cluster = cluster_of(config)
    assert cluster is not None and cluster["startup_s"] == [12.5] * 3
    of_origin = {key: value.sure for key, value in cluster.figures.items()}
    assert {key for key, sure in of_origin.items() if sure == "measured"} == {
        "device", "memory_gib", "achieved_tflop_s.float32", "c0_s", "host_s", "c0_tensors", "jitter_s", "first_step_s",
        "gpus_per_node", "cores_per_node", "startup_s", "checkpoint_gb_s", "decode_prepared_s", "read_gb_s",
    }  # fmt: skip
    assert cluster["c0_tensors"] == 62
    text = capsys.readouterr().out
    assert "fit        c0 " in text and "guessed    nodes, " in text

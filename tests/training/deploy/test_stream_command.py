"""stream.py: the network's scores equal those of the offline network on the same frames, and the output reports them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pipelines.stream.frame_sampling import DENSE_WINDOW
from tests.helpers.clips import smooth_video, write_video
from tests.helpers.tiny_run import write_run
from tests.helpers.worlds import CHECKOUT
from tests.training.config.test_config import config_of
from training.deploy.frame_interval import frames_of, trained_interval
from training.deploy.live_network import LiveNetwork, Speed
from training.deploy.live_sources import open_source
from training.deploy.load import load_trained
from training.deploy.stream_command import _status, run_stream
from training.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["wave", "clap", "jump"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A past-only run and one that looks ahead, next to a video of 12 frames."""
    folder = tmp_path_factory.mktemp("stream")
    write_run(folder / "past", CLASSES, "model.direction=past", "data.root=/gone", "numerics.dtype=float64")
    write_run(folder / "both", CLASSES, "data.root=/gone")
    write_video(folder / "a.mp4", smooth_video(12, 48, 80))
    return folder


def lines_of(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert run_stream([str(folder / "past"), str(folder / "a.mp4"), *arguments], "") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_scores_are_those_of_the_offline_network(folder: Path) -> None:
    """The clip has the evaluation's own preprocessing: its protocol's frames of a video of four frames are all four."""
    run = load_trained(str(folder / "past"), ["distributed.device=cpu"])
    with open_source(str(folder / "a.mp4")) as source:
        images = [frame.image_HWC for frame in source.frames][:4]
    network = LiveNetwork(run, mean_of=4)
    for image_HWC in images:
        found = network(image_HWC)
    clip_TCHW = torch.cat([network._crop(image_HWC) for image_HWC in images])
    with torch.inference_mode():
        expected_K = run.network(run.normaliser(clip_TCHW[None]))[0].softmax(0)
    torch.testing.assert_close(found.score_K.double(), expected_K, rtol=0, atol=1e-6)
    # 48 x 80 is scaled to 36 x 60, by the protocol's rule of 8 / 7, and cut to 32 x 32.
    assert clip_TCHW.shape == (4, 3, 32, 32) and clip_TCHW.dtype == torch.uint8


def test_lines_and_annotated_video(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every second frame of 24 frames/s, as after training on clips; all of them in the video."""
    *lines, last = lines_of(folder, capsys, "--top", "2", "--output", str(tmp_path / "out.mp4"))
    assert [line["frame"] for line in lines] == [0, 2, 4, 6, 8, 10]
    assert lines[1]["time_s"] == pytest.approx(2 / 24, abs=1e-4)
    for line in lines:
        scores = line["scores"]
        assert isinstance(scores, dict) and len(scores) == 2 and set(scores) < set(CLASSES)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert last["frames"] == 6
    assert set(last["latency_ms"]) == {"p50", "p95", "p99"}  # type: ignore[call-overload]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 12


def test_frames_show_speed_and_percentiles() -> None:
    speed = Speed()
    for latency_s in np.arange(1, 101) / 1000:
        speed.add(float(latency_s))
    assert speed.latency_ms() == pytest.approx({"p50": 50.5, "p95": 95.05, "p99": 99.01})
    assert re.fullmatch(r"\d+\.\d frames/s   ms: p50 50\.5  p95 95\.\d  p99 99\.0", _status(speed))


def test_fps_and_seconds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *lines, _ = lines_of(folder, capsys, "--fps", "8", "--seconds", "0.3")
    assert [line["frame"] for line in lines] == [0, 3, 6]


def test_mean_averages_logits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first frame has nothing to average, later ones do."""
    one, four = (lines_of(folder, capsys, "--mean", mean) for mean in ("1", "4"))
    assert one[0]["scores"] == four[0]["scores"] and one[3]["scores"] != four[3]["scores"]


@pytest.mark.parametrize("rate", [20.0, None])
def test_the_distance_trained(rate: float | None) -> None:
    """At the training videos' rate, if it is known, else at the source's; the card says the same, in words too."""
    known = f"data.frame_rate={'null' if rate is None else rate}"
    settings = {
        DENSE_WINDOW / 8: ("smoke", "pipeline.sampling=dense", "model.num_frames=8"),
        2.5: ("smoke_online", "pipeline.distances=[1,2,3,5]"),
        2: ("smoke",),
    }
    for distance, (experiment, *overrides) in settings.items():
        config = config_of(f"experiment={experiment}", known, *overrides)
        interval_s, note = trained_interval(config, 30.0)
        card = frames_of(config)
        assert interval_s == distance / (rate or 30.0)
        assert (card["frame_rate"], card["interval_s"]) == (rate, rate and interval_s)
        assert note.startswith(card["note"])
        if rate is None:
            assert "not known" in card["note"] and "30 frames/s" in note and "data.frame_rate=RATE" in note
        else:
            assert "at the training videos' 20 frames/s" in card["note"]


def test_a_run_older_than_the_frame_rate(tmp_path: Path) -> None:
    """Its configuration lacks the key, which the user may give."""
    write_run(tmp_path / "old", CLASSES, "model.direction=past", "data.root=/gone")
    file = tmp_path / "old" / "config.yaml"
    file.write_text(file.read_text().replace("  frame_rate: 24.0\n", ""))
    assert load_trained(str(tmp_path / "old")).config.data.frame_rate is None
    assert load_trained(str(tmp_path / "old"), ["data.frame_rate=12"]).config.data.frame_rate == 12


def test_a_network_that_looks_ahead_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"both cannot run on a stream.*Fix: .*direction=past"):
        LiveNetwork(load_trained(str(folder / "both")), 4)
    assert run_stream([str(folder / "both"), str(folder / "a.mp4")], "") == 2
    assert "Fix" in capsys.readouterr().err


def test_bad_arguments(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "past")
    (folder / "no.mp4").write_bytes(b"no video")
    assert run_stream([run, str(folder / "no.mp4"), "--output", str(folder / "out.mp4")], "") == 3
    assert not (folder / "out.mp4").exists()
    for arguments in (["--top", "0"], ["--fps", "-1"], ["--output", "a.avi"], ["another.mp4"]):
        with pytest.raises(SystemExit, match="2"):
            run_stream([run, "a.mp4", *arguments], "")
        assert "Fix" in capsys.readouterr().err


@pytest.mark.slow
def test_the_program(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "stream.py", str(folder / "past"), str(folder / "a.mp4"), "distributed.device=cpu"],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["frames"] == 6
    assert "frames 83.3 ms apart: every second frame" in done.stderr and "24 frames/s" in done.stderr

"""stream.py: the network's scores equal those of the offline network on the same frames, and the output reports them."""

import json
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from pipelines.stream.frame_sampling import DENSE_WINDOW
from tests.helpers.clips import smooth_video, write_video
from tests.helpers.tiny_run import write_run
from tests.helpers.worlds import CHECKOUT
from tests.training.config.test_config import config_of
from training.deploy.live_network import LiveNetwork
from training.deploy.live_sources import open_source
from training.deploy.load import load_trained
from training.deploy.stream_command import run_stream, trained_interval
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


def test_fps_and_seconds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *lines, _ = lines_of(folder, capsys, "--fps", "8", "--seconds", "0.3")
    assert [line["frame"] for line in lines] == [0, 3, 6]


def test_mean_averages_logits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first frame has nothing to average, later ones do."""
    one, four = (lines_of(folder, capsys, "--mean", mean) for mean in ("1", "4"))
    assert one[0]["scores"] == four[0]["scores"] and one[3]["scores"] != four[3]["scores"]


def test_the_distance_trained() -> None:
    dense = config_of("experiment=smoke", "pipeline.sampling=dense", "model.num_frames=8")
    assert trained_interval(dense, 32.0)[0] == DENSE_WINDOW // 8 / 32.0
    stream = config_of("experiment=smoke")
    vars(stream.pipeline).update(sampling="stream", distances=[1, 2, 3, 4, 5])
    assert trained_interval(stream, 30.0)[0] == 3 / 30
    uniform, note = trained_interval(config_of("experiment=smoke"), 30.0)
    assert uniform == 2 / 30 and "--fps" in note


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
    assert "--fps" in done.stderr

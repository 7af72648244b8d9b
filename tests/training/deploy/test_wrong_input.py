"""predict.py, stream.py and export.py end with a line that says what to do, whatever they are given."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.clips import plain_video, smooth_video, write_frames, write_mp4
from tests.helpers.tiny_run import write_run
from training.deploy.annotated_video import video_writer
from training.deploy.export.command import run_export
from training.deploy.predict_command import run_predict
from training.deploy.stream_command import run_stream

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["wave", "clap", "jump"]
AWKWARD = "a 'b' \"c\", d=e\n%d é"
"""A name with quotes, spaces, a comma, a line break, a percent sign, and what looks like an override."""

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A past-only run that was moved to a folder with an awkward name."""
    folder = tmp_path_factory.mktemp("wrong")
    write_run(folder / "mine", CLASSES, "model.direction=past", "data.root=/gone")
    (folder / "mine").rename(folder / "it's mine")
    return folder


def run_of(folder: Path) -> str:
    return str(folder / "it's mine")


def predicted(run: str, *arguments: str) -> int:
    return run_predict([run, *arguments], "")


def streamed(run: str, *arguments: str) -> int:
    return run_stream([run, *arguments], "")


def exported(run: str, *arguments: str) -> int:
    return run_export([run, "format=torch"], "")


@pytest.mark.parametrize("command", [predicted, streamed, exported])
def test_what_is_no_run_is_refused(command: Callable[..., int], tmp_path: Path, capsys: Capture) -> None:
    video = write_mp4(tmp_path / "a.mp4")
    (tmp_path / "empty").mkdir()
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "model.json").write_text('{"schema": "tsm-model-card/1"}')
    for run in (tmp_path / "none", tmp_path / "empty", tmp_path / "card", video, tmp_path / ("x" * 300)):
        assert command(str(run), str(video)) == 2, run
        err = capsys.readouterr().err
        assert "Fix: " in err.splitlines()[-1] and "Traceback" not in err, err


@pytest.mark.parametrize("command", [predicted, streamed])
def test_what_is_no_video_is_refused(
    folder: Path, command: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    """A text, an empty file, a folder with nothing in it, a name that is too long, and half a video."""
    (tmp_path / "text.mp4").write_text("no video\n" * 1000)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder").mkdir()
    whole = write_mp4(tmp_path / "whole.mp4", plain_video(9)).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("text.mp4", "empty.mp4", "folder", "x" * 300 + ".mp4", "half.mp4"):
        assert command(run_of(folder), str(tmp_path / name)) == 3, name
        err = capsys.readouterr().err
        assert name in err.splitlines()[-1] and "Traceback" not in err, err


def test_a_long_override_is_no_name(folder: Path, capsys: Capture) -> None:
    assert predicted(run_of(folder), "a.mp4", f"data.mirrored_words=[[left,{'x' * 300}]]") == 3
    assert "Traceback" not in capsys.readouterr().err


def test_awkward_names_keep_the_output_whole(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    video = tmp_path / AWKWARD / f"{AWKWARD}.mp4"
    write_mp4(video, plain_video(9))
    (tmp_path / AWKWARD / "no\nvideo.mp4").touch()
    arguments = (str(tmp_path / AWKWARD), "--top", "2")
    assert predicted(run_of(folder), *arguments) == 3
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "\\n%d é.mp4" in out
    (refused,) = [line for line in err.splitlines() if line.startswith("refused: ")]
    assert "no\\nvideo.mp4" in refused
    assert predicted(run_of(folder), *arguments, "--format", "json") == 3
    assert [json.loads(line)["video"] for line in capsys.readouterr().out.splitlines()] == [str(video)]
    assert predicted(run_of(folder), *arguments, "--format", "csv") == 3
    assert {row["video"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))} == {str(video)}

    output = tmp_path / AWKWARD / "drawn\n.mp4"
    assert streamed(run_of(folder), str(video), "--output", str(output)) == 0
    assert all(map(json.loads, capsys.readouterr().out.splitlines())) and output.stat().st_size > 0


def test_outputs_that_cannot_be_written_are_refused_before_work(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    video = write_mp4(tmp_path / "a.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to(video)
    before = video.read_bytes()
    for output, message in {
        "none/out.mp4": "there is no folder",
        "folder.mp4": "it is a folder",
        "a.mp4": "it is the input. Fix: another name",
        "link.mp4": "it is the input",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            streamed(run_of(folder), str(video), "--output", str(tmp_path / output))
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        predicted(run_of(folder), str(video), "--explain", str(tmp_path / "folder.mp4"))
    assert video.read_bytes() == before
    # An export's folder is the run's: a file stands in its place.
    copy = shutil.copytree(run_of(folder), tmp_path / "copy")
    (copy / "export").touch()
    assert exported(str(copy)) == 2
    assert "cannot write" in capsys.readouterr().err


# --- Odd videos -------------------------------------------------------------------------------------------------------


def test_a_video_of_one_frame(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    video = write_mp4(tmp_path / "one.mp4", plain_video(1))
    assert predicted(run_of(folder), str(video)) == 0
    capsys.readouterr()
    assert streamed(run_of(folder), str(video), "--output", str(tmp_path / "out.mp4")) == 0
    only, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (only["frame"], last["frames"], last["fps"]) == (0, 1, 0)


def test_images_with_an_alpha_channel(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """A file is a video of one frame; as a frame of a folder of JPEG images it is refused."""
    image = Image.fromarray(np.full((40, 50, 4), 128, np.uint8), "RGBA")
    image.save(tmp_path / "a.png")
    for command in (predicted, streamed):
        assert command(run_of(folder), str(tmp_path / "a.png")) == 0
    capsys.readouterr()
    frames = write_frames(tmp_path / "frames", plain_video(4))
    image.save(frames / "00002.jpg", format="png")
    assert predicted(run_of(folder), str(frames)) == 3
    err = capsys.readouterr().err
    assert "refused: " in err and "Traceback" not in err


def test_frames_of_a_variable_rate_are_chosen_by_their_times(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """10 frames at 50 frames/s, a pause, 10 at 10 frames/s: a frame each 0.1 s is every fifth one, then all."""
    times_s = [*np.arange(10) / 50, *(1 + np.arange(10) / 10)]
    video = tmp_path / "variable.mp4"
    with video_writer(video, 50.0) as write:
        for time_s, image_HWC in zip(times_s, smooth_video(20), strict=True):
            write(float(time_s), image_HWC)
    assert predicted(run_of(folder), str(video)) == 0
    capsys.readouterr()
    assert streamed(run_of(folder), str(video), "--fps", "10") == 0
    *lines, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["frame"] for line in lines] == [0, 5, *range(10, 20)]
    assert [line["time_s"] for line in lines] == pytest.approx([0, 0.1, *times_s[10:]], abs=0.001)
    assert last["frames"] == 12

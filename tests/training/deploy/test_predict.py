"""Predictions equal the logits that evaluate.py saves, and predict.py reports them and the videos that it refuses."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.errors import BadClip
from pipelines.jpeg_clips import JPEG_FRAMES
from pipelines.manifest import Manifest
from pipelines.prepare.annotations.class_folders import read_class_folders
from pipelines.prepare.scan.write_manifests import scan_one, write_manifests
from pipelines.prepare.shapes.write import GeneratedConfig, write_generated
from predict import load
from tests.helpers.clips import plain_video, write_both_kinds, write_mp4
from tests.helpers.tiny_run import evaluate_here, write_run
from tests.helpers.worlds import CHECKOUT
from training.deploy.load import load_trained
from training.deploy.predict import Prediction, Predictor, Refused
from training.deploy.predict_command import run_predict
from training.evaluation.metrics import ClipLogits
from training.evaluation.saved_logits import load_logits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the shapes, next to its 20 validation clips: more than a batch."""
    folder = tmp_path_factory.mktemp("shapes")
    write_generated(folder / "clips", GeneratedConfig(train_clips=10, val_clips=20))
    classes = Manifest.open(folder / "clips" / "val.arrow").classes
    write_run(folder / "mine", classes, "optimizer.ema_decay=0.9", "data.root=/gone")
    return folder


@pytest.fixture(scope="module")
def both_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on videos and folders of JPEG frames with class names that a mirror exchanges, next to its validation clips."""
    folder = tmp_path_factory.mktemp("both")
    write_both_kinds(folder / "clips", {"train": 1, "val": 3})
    for split in ("train", "val"):
        for old, new in {"one": "turn left", "two": "turn right"}.items():
            (folder / "clips" / split / old).rename(folder / "clips" / split / new)
    write_manifests(folder / "clips", read_class_folders(folder / "clips", None), workers=0)
    write_run(folder / "mine", ["turn left", "turn right"], "pipeline.sampling=dense", "data.root=/gone")
    return folder


def saved_by_evaluate(folder: Path, *overrides: str) -> ClipLogits:
    """Evaluate as evaluate.py does, and return the logits in the file that it saved."""
    shutil.rmtree(folder / "mine" / "logits", ignore_errors=True)
    own = ["evaluation.save_logits=true", f"data.root={folder / 'clips'}"]
    assert evaluate_here(folder / "mine", *overrides, *own) == 0
    (path,) = (folder / "mine" / "logits").glob("*.safetensors")
    return load_logits(path)[0]


def validation_clips(folder: Path) -> list[Path]:
    """Paths as a user gives them: files, and folders of frames."""
    manifest = Manifest.open(folder / "clips" / "val.arrow")
    rows = [manifest.row(index) for index in range(len(manifest))]
    paths = [manifest.root / row.path for row in rows]
    return [path.parent if row.codec == JPEG_FRAMES else path for path, row in zip(paths, rows, strict=True)]


@pytest.mark.parametrize("data", ["shapes", "both_kinds"])
@pytest.mark.parametrize("protocol", ["validation", "ten_crop", "two_clips_full"])
def test_predictions_are_the_logits_that_evaluate_saves(
    data: str, protocol: str, request: pytest.FixtureRequest
) -> None:
    """Of every validation clip, to the bit. Neither manifests nor data.root are needed."""
    folder: Path = request.getfixturevalue(data)
    saved = saved_by_evaluate(folder, f"evaluation={protocol}")
    videos = validation_clips(folder)
    assert len({tuple(logit_K) for logit_K in saved.logit_NK.tolist()}) > len(videos) // 2
    found = list(Predictor(load_trained(str(folder / "mine"), [f"evaluation={protocol}"])).predict(videos))
    predictions = [each for each in found if isinstance(each, Prediction)]
    assert [each.video for each in predictions] == [str(video) for video in videos]
    assert torch.equal(torch.stack([each.logit_K for each in predictions]), saved.logit_NK)
    classes = Manifest.open(folder / "clips" / "val.arrow").classes
    assert [each.class_name for each in predictions] == [classes[label] for label in saved.logit_NK.argmax(1).tolist()]


def test_three_lines_of_python_name_the_class(shapes: Path) -> None:
    """A single video costs no batch of padding, so its sums may be rounded otherwise than an evaluation's."""
    video = validation_clips(shapes)[3]
    predict = load(shapes / "mine", "evaluation.batch=7")
    found = predict(video)
    (in_batch,) = [each for each in predict.predict(validation_clips(shapes)) if each.video == str(video)]
    assert isinstance(in_batch, Prediction) and found.class_name == in_batch.class_name
    assert found.logit_K.tolist() == pytest.approx(in_batch.logit_K.tolist(), rel=1e-4, abs=1e-4)
    assert next(iter(found.scores)) == found.class_name
    assert list(found.scores.values()) == sorted(found.scores.values(), reverse=True)
    assert sum(found.scores.values()) == pytest.approx(1)
    with pytest.raises(BadClip, match=r"none\.mp4: no such file"):
        predict("none.mp4")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of three good clips, and of three that prepare.py leaves out."""
    folder = tmp_path / "mixed"
    for name in ("a.mp4", "b, c.mp4", "deep/d.MP4"):
        write_mp4(folder / name, plain_video(9))
    content = (folder / "a.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    (folder / "empty.webm").touch()
    (folder / "text.avi").write_text("no video")
    (folder / "notes.txt").touch()
    return folder


def test_videos_that_a_scan_leaves_out_are_refused_in_its_words(shapes: Path, mixed: Path) -> None:
    videos = [mixed / "cut.mp4", mixed / "a.mp4", mixed / "empty.webm", mixed / "text.avi", mixed / "gone.mp4"]
    found = list(load(shapes / "mine").predict(videos))
    assert [isinstance(each, Refused) for each in found] == [True, False, True, True, True]
    for each in found:
        if isinstance(each, Refused):
            assert each.reason == scan_one((mixed, Path(each.video).name, None)).reason != ""


def test_the_output_in_each_format(shapes: Path, mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad files get a line each and the exit code 3; good ones are predicted all the same."""
    names = [str(mixed / name) for name in ("a.mp4", "b, c.mp4", "deep/d.MP4")]
    arguments = [str(shapes / "mine"), str(mixed), str(mixed / "gone.mp4"), "--top", "2"]

    assert run_predict([*arguments, "--format", "json", "evaluation.batch=8"], "") == 3
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["video"] for record in records] == names
    assert all(len(record["scores"]) == 2 and record["class"] == next(iter(record["scores"])) for record in records)
    refused = [line for line in err.splitlines() if line.startswith("refused: ")]
    assert [line.split(": ")[1] for line in refused] == [
        str(mixed / name) for name in ("cut.mp4", "empty.webm", "text.avi", "gone.mp4")
    ]
    assert "mine step 5  4x32-uniform_validation-1crop  on " in err

    assert run_predict([*arguments, "--format", "csv"], "") == 3
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["video"], row["rank"]) for row in rows] == [(name, rank) for name in names for rank in "12"]
    assert [(row["class"], float(row["score"])) for row in rows[:2]] == list(records[0]["scores"].items())

    assert run_predict([str(shapes / "mine"), names[0], "--top", "1"], "") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"{names[0]}  {records[0]['scores'][records[0]['class']]:7.2%}  {records[0]['class']}"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("outputs/none a.mp4", 2, "error (predict): outputs/none: there is no folder"),
        ("RUN a.mp4 model.shift=none", 2, "Fix: model.shift=residual"),
        ("RUN a.mp4 model.shfit=none", 2, "Fix: the nearest known key is model.shift"),
        ("RUN EMPTY", 3, "refused: EMPTY: no video and no folder of JPEG frames in it or below it"),
        ("RUN a.mp4 --top 0", 2, "Fix: give 1 or more"),
        ("RUN evaluation=validation", 2, "no VIDEO given"),
    ],
)
def test_wrong_arguments_are_refused(
    shapes: Path, tmp_path: Path, arguments: str, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def given(text: str) -> str:
        return text.replace("RUN", str(shapes / "mine")).replace("EMPTY", str(tmp_path))

    try:
        found = run_predict(given(arguments).split(), "")
    except SystemExit as end:
        found = int(end.code or 0)
    assert found == code
    assert given(says) in capsys.readouterr().err


def test_pages_explain_validation_clips_and_given_videos(
    shapes: Path, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_here(shapes / "mine", "evaluation.explain=3", f"data.root={shapes / 'clips'}") == 0
    page = (shapes / "mine" / "explain.html").read_text()
    assert page.count("<article>") == 3 and "mine step 5  4x32-uniform_validation-1crop  top-1 " in page
    assert f"explained: {shapes / 'mine' / 'explain.html'}" in capsys.readouterr().out
    page_of_mine = tmp_path / "page.html"
    assert run_predict([str(shapes / "mine"), str(mixed), "--explain", str(page_of_mine)], "") == 3
    page = page_of_mine.read_text()
    assert page.count("<article>") == 3 and 'class="tag' not in page


@pytest.mark.slow
def test_many_videos_are_read_by_worker_processes(shapes: Path, tmp_path: Path) -> None:
    """The whole command, from another folder, on more videos than are worth starting processes for; a link names the run."""
    (tmp_path / "run").symlink_to(shapes / "mine")
    (tmp_path / "clips").symlink_to(shapes / "clips" / "val")
    arguments = ["run", "clips", "--top", "1", "--format", "csv", "pipeline.workers=1"]
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "predict.py"), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    saved = saved_by_evaluate(shapes)
    classes = Manifest.open(shapes / "clips" / "val.arrow").classes
    expected = {
        video.relative_to(shapes / "clips" / "val").as_posix(): classes[label]
        for video, label in zip(validation_clips(shapes), saved.logit_NK.argmax(1).tolist(), strict=True)
    }
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert {row["video"].removeprefix("clips/"): row["class"] for row in rows} == expected

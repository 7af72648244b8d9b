"""An exported folder is enough to predict, and its predictions are those of its run."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from predict import load
from tests.helpers.clips import smooth_video, write_mp4
from tests.helpers.tiny_run import write_run
from training.deploy.export.command import run_export
from training.deploy.exported import load_exported
from training.deploy.predict_command import run_predict
from training.deploy.stream_command import run_stream
from training.errors import ConfigError

CLASSES = ["move left", "move right", "stay"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exports `stream` and `clip` of a run, beside the run `mine` and a video."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is of the extra onnx: make dev installs it")
    folder = tmp_path_factory.mktemp("exports")
    write_run(folder / "mine", CLASSES, "model.direction=past", "data.root=/gone")
    for form in ("stream", "clip"):
        assert run_export([str(folder / "mine"), f"form={form}"], "") == 0
        shutil.move(folder / "mine/export" / f"onnx-fp32-{form}", folder / form)
    write_mp4(folder / "a.mp4", smooth_video(17, 60, 90))
    return folder


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("form", "overrides"), [("stream", ("evaluation=ten_crop", "evaluation.batch=3")), ("stream", ()), ("clip", ())]
)
def test_an_export_predicts_what_its_run_predicts(exports: Path, form: str, overrides: tuple[str, ...]) -> None:
    found = load(exports / form, *overrides)(exports / "a.mp4")
    wanted = load(exports / "mine", "distributed.device=cpu", *overrides)(exports / "a.mp4")
    assert (found.logit_K - wanted.logit_K).abs().max() <= 1e-4 * wanted.logit_K.abs().max()
    assert found.class_name == wanted.class_name
    assert set(found.scores) == set(CLASSES)


def test_the_command_takes_an_export_alone(exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moved elsewhere, without the run."""
    moved = shutil.copytree(exports / "stream", tmp_path / "moved")
    assert run_predict([str(moved), str(exports / "a.mp4"), "--format", "json"], "") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["class"] in CLASSES
    assert "exported from mine: onnx, fp32, stream" in printed.err
    assert "4x32-uniform_validation-1crop" in printed.err


@pytest.mark.usefixtures("one_thread")
def test_an_export_streams_what_its_run_streams(exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same frames, with the same scores, and the interval that the card states."""

    def lines_of(run: Path, *overrides: str) -> tuple[list[dict[str, Any]], str]:
        assert run_stream([str(run), str(exports / "a.mp4"), "--top", "3", *overrides], "") == 0
        printed = capsys.readouterr()
        assert "every second frame" in printed.err
        *lines, last = map(json.loads, printed.out.splitlines())
        assert last["frames"] == len(lines) > 3
        return lines, printed.err

    for override in ((), ("data.frame_rate=null",)):
        found, said = lines_of(exports / "stream", *override)
        wanted, _ = lines_of(exports / "mine", "distributed.device=cpu", *override)
        assert ("not known" in said) == bool(override)
        assert [line["frame"] for line in found] == [line["frame"] for line in wanted]
        for line, expected in zip(found, wanted, strict=True):
            assert line["scores"] == pytest.approx(expected["scores"], abs=1e-3)
    assert run_stream([str(exports / "clip"), str(exports / "a.mp4")], "") == 2
    assert "exported for whole clips. Fix: python export.py RUN form=stream" in capsys.readouterr().err


def test_a_card_tells_how_a_stream_was_trained(exports: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exports / "stream", tmp_path / "online")
    card = json.loads((folder / "model.json").read_text())
    # As older versions wrote it.
    card["frames"] = {"num_frames": 2, "sampling": "stream", "distances": [2, 7]}
    (folder / "model.json").write_text(json.dumps(card))
    config = load_exported(folder).config
    assert (config.pipeline.sampling, config.pipeline.distances, config.data.frame_rate) == ("stream", [2, 7], None)
    assert load_exported(folder, ["data.frame_rate=12"]).config.data.frame_rate == 12
    assert load_exported(folder).protocol.name == "2x32-uniform_validation-1crop"


def test_what_an_export_cannot_do_is_refused(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for override, message in {
        "model.num_frames=8": r"model\.num_frames=8 cannot be applied .* which has 4\. Fix: leave it out",
        "pipeline.size=64": r"pipeline\.size=64 cannot be applied",
        "evaluation.amp=bfloat16": r"evaluation\.amp=bfloat16 cannot be applied",
        "evaluation.full_resolution=true": r"frames of 36 px, and the network was exported for 32 px\. Fix",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load(exports / "stream", override)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"needs ONNX Runtime .* Fix: pip install -c constraints\.txt onnxruntime"):
        load(exports / "stream")


def test_a_folder_that_is_not_a_whole_export_is_refused(exports: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exports / "stream", tmp_path / "broken")
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.onnx").write_bytes(b"another")
    with pytest.raises(ConfigError, match=r"is not the file that model\.json describes\. Fix"):
        load(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*model\.onnx: .* Fix: copy the whole folder"):
        load(folder)
    for change, message in (
        ({"format": "executorch"}, "predict.py and stream.py read onnx. Fix: python export.py RUN format=onnx"),
        ({"schema": "tsm-model-card/9"}, "has the schema tsm-model-card/9, and this version reads"),
    ):
        (folder / "model.json").write_text(json.dumps(card | change))
        with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
            load(folder)
    (folder / "model.json").write_text("[")
    with pytest.raises(ConfigError, match=r"is no model card .* Fix: export the run again"):
        load(folder)

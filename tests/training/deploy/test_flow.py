"""A flow run in use: it is exported, and programs that have frames only refuse it before any work."""

import json
from pathlib import Path

import pytest

from tests.helpers.tiny_run import write_run
from training.deploy.export.command import run_export
from training.deploy.exported import load_run_or_export
from training.deploy.predict_command import run_predict
from training.deploy.stream_command import run_stream
from training.errors import ConfigError

CLASSES = ["move left", "move right", "stay"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow") / "mine"
    write_run(folder, CLASSES, "model.modality=flow", "model.direction=past", "data.root=/gone")
    return folder


@pytest.mark.parametrize("program", [run_predict, run_stream])
def test_programs_that_have_frames_only_refuse_it(
    program: object, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not looked at")
    assert callable(program) and program([str(run), str(tmp_path / "a.mp4")], "") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "mine is a network for model.modality=flow" in printed.err and "Fix: an RGB run" in printed.err


@pytest.mark.parametrize(("form", "shape"), [("stream", ["N", 10, 32, 32]), ("clip", ["N", 4, 10, 32, 32])])
def test_it_is_exported_and_its_card_says_so(run: Path, form: str, shape: list[object]) -> None:
    assert run_export([str(run), "format=torch", f"form={form}"], "") == 0
    folder = run / "export" / f"torch-fp32-{form}"
    card = json.loads((folder / "model.json").read_text())
    assert card["inputs"][0]["shape"] == shape
    assert card["pixels"]["colour"] == "flow"
    assert card["pixels"]["mean"] == [127.5] * 10
    assert card["pixels"]["std"] == pytest.approx([255 * (0.229 + 0.224 + 0.225) / 3] * 10)
    card["format"] = "onnx"
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(ConfigError, match=r"network for model\.modality=flow.*Fix: an RGB run"):
        load_run_or_export(str(folder))

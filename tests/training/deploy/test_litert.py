"""Export to LiteRT, with stand-ins for the converter and the runtime: neither is installed where tests run.

The real ones were run by hand (docs/export.md). The stand-ins keep torch's program in the .tflite file.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_run import write_run
from training.deploy.export import command, formats
from training.deploy.export.formats import find_format
from training.deploy.export.litert_packages import VERSION, packages_folder
from training.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

CONVERTER = """
import io
import torch
import only_of_the_converter

class Model:
    def __init__(self, program):
        self.program = program

    def export(self, path):
        buffer = io.BytesIO()
        torch.export.save(self.program, buffer)
        with open(path, "wb") as file:
            file.write(buffer.getvalue())

def convert(module, sample_kwargs):
    assert not module.training
    return Model(torch.export.export(module, (), sample_kwargs))
"""

RUNTIME = """
import io
import torch

class Interpreter:
    def __init__(self, model_content, num_threads):
        assert num_threads is None
        self.module = torch.export.load(io.BytesIO(model_content)).module()

    def get_signature_runner(self):
        @torch.no_grad()
        def run(**inputs):
            outputs = self.module(**{name: torch.from_numpy(value) for name, value in inputs.items()})
            return {name: outputs[name].numpy() for name in reversed(outputs)}
        return run
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "mine", ["left", "right"], "model.direction=past", "data.root=/gone")
    return tmp_path / "mine"


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The converter's folder with a stand-in, which imports a package that only this folder has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = packages_folder()
    folder.mkdir(parents=True)
    (folder / "only_of_the_converter.py").write_text("")
    (folder / "litert_torch.py").write_text(CONVERTER)
    return folder


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for ai-edge-litert in this process."""
    folder = tmp_path / "site"
    (folder / "ai_edge_litert").mkdir(parents=True)
    (folder / "ai_edge_litert" / "__init__.py").write_text("")
    (folder / "ai_edge_litert" / "interpreter.py").write_text(RUNTIME)
    (folder / "ai_edge_litert-9.9.dist-info").mkdir()
    (folder / "ai_edge_litert-9.9.dist-info" / "METADATA").write_text("Name: ai-edge-litert\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(folder))
    yield
    for name in [name for name in sys.modules if name.startswith("ai_edge_litert")]:
        del sys.modules[name]


def export(run: Path) -> int:
    return command.run_export([str(run), "format=litert"], "")


@pytest.mark.slow
@pytest.mark.usefixtures("converter", "runtime")
def test_the_converter_runs_with_its_own_packages_and_writes_the_cards_names(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run) == 0, capsys.readouterr().err
    folder = run / "export" / "litert-fp32-stream"
    card = json.loads((folder / "model.json").read_text())
    assert card["check"]["largest_difference"] <= 1e-4 and list(card["files"]) == ["model.tflite"]
    assert card["made_with"]["litert-torch"] == VERSION and card["made_with"]["ai_edge_litert"] == "9.9"
    module = torch.export.load(folder / "model.tflite").module()
    with torch.no_grad():
        outputs = module(**{each["name"]: torch.zeros(1, *each["shape"][1:]) for each in card["inputs"]})
    assert list(outputs) == [each["name"] for each in card["outputs"]]


@pytest.mark.slow
@pytest.mark.usefixtures("runtime")
def test_a_converter_that_fails_leaves_no_file(run: Path, converter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (converter / "litert_torch.py").write_text(
        "def convert(module, sample_kwargs): raise ValueError('no such operator')"
    )
    earlier = run / "export" / "litert-fp32-stream"
    earlier.mkdir(parents=True)
    assert export(run) == 1
    assert "ValueError: no such operator. Fix: " in capsys.readouterr().err
    assert not earlier.exists()


def test_a_missing_converter_or_runtime_is_named_before_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs ai_edge_litert.*Fix: tools/setup_venv\.sh \.venv litert"):
        find_format("litert")
    monkeypatch.setattr(formats, "find_spec", lambda name: object())
    assert export(run) == 2
    assert f"litert-torch in {tmp_path}/tsm-at-scale" in (error := capsys.readouterr().err)
    assert "Fix: .venv/bin/python -m tools.fetch_litert" in error and not (run / "export").exists()

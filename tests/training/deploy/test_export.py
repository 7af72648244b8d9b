"""Exported files compute what PyTorch computes, and a file that does not is never kept."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tests.helpers.clips import smooth_video, write_clips
from tests.helpers.official_reference import randomise
from tests.helpers.tiny_run import write_run
from tests.helpers.worlds import CHECKOUT
from training.deploy.export import command, formats
from training.deploy.export.card import accuracy_of
from training.deploy.export.check import ExportError, Run, largest_difference
from training.deploy.export.formats import Format, find_format
from training.deploy.export.forms import Exportable, Files, exportable
from training.deploy.load import load_trained
from training.errors import ConfigError, DataError
from training.runs.run_folder import RunFolder
from tsm import streaming
from tsm.networks import TemporalNetwork, build_network
from tsm.streaming import streaming_network

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["move left", "move right", "stay"]
ACCURACY = {"protocol": "4x32-uniform_validation-1crop", "top1_percent": 87.5, "clips": 8}
ON_STREAM = {"protocol": "4x32-stream-1crop", "amp": "off", "clips": 8, "missing": 0}
ROW = {"distance": 3, "frames_per_clip": 10.5, "last_frame_percent": 75.0, "mean_of_4_percent": 87.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A past-only run whose data are gone, with two evaluations, of which the second is of its checkpoint, and one on a stream."""
    folder = tmp_path_factory.mktemp("outputs") / "mine"
    write_run(folder, CLASSES, "model.direction=past", "data.root=/gone")
    records = [{"kind": "evaluation", "time_s": 1.0, "step": step, "epoch": 0.5, **ACCURACY} for step in (4, 5)]
    RunFolder(folder).metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = [ROW | {"early_percent": {"last_frame": [50.0]}}]
    on_stream = {
        "source": "mine",
        "step": 5,
        **ON_STREAM,
        "classes_sha256": "0",
        "stream": rows,
        "early": {"curves": []},
    }
    RunFolder(folder).stream.write_text(json.dumps(on_stream))
    return folder


@pytest.fixture
def onnx_packages() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is of the extra onnx: make dev installs it")


def export(run: Path, *settings: str) -> int:
    return command.run_export([str(run), *settings], "")


def frames_of(batch: int, count: int) -> Tensor:
    return 2 * torch.rand(batch, count, 3, 32, 32, generator=torch.Generator().manual_seed(3)) - 1


def network_of(run: Path) -> TemporalNetwork:
    return load_trained(str(run), ["distributed.device=cpu"]).network


def session_of(run: Path, name: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(run / "export" / name / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.usefixtures("onnx_packages")
@torch.no_grad()
def test_an_onnx_stream_equals_pytorch_over_64_frames(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(run) == 0
    assert "checked against PyTorch: 64 frames" in capsys.readouterr().out
    session, network = session_of(run, "onnx-fp32-stream"), streaming_network(network_of(run))
    for batch, count in ((1, 64), (3, 8)):
        caches = network.initial_caches(batch)
        fed = {
            value.name: np.zeros((batch, *value.shape[1:]), np.float32)
            for value in session.get_inputs()
            if value.name != "frame"
        }
        for frame_NCHW in frames_of(batch, count).unbind(1):
            logit_NK, caches = network.stream(frame_NCHW, caches)
            got_NK, *kept = session.run(None, {"frame": frame_NCHW.numpy(), **fed})
            fed = dict(zip(fed, kept, strict=True))
            assert np.abs(got_NK - logit_NK.numpy()).max() <= 1e-4 * logit_NK.abs().max()


@pytest.mark.usefixtures("onnx_packages")
@torch.no_grad()
def test_an_onnx_clip_takes_any_number_of_clips(run: Path) -> None:
    assert export(run, "form=clip") == 0
    session, network = session_of(run, "onnx-fp32-clip"), network_of(run)
    for batch in (1, 2, 3, 5):
        clips_NTCHW = frames_of(batch, 4)
        expected_NK = network(clips_NTCHW)
        got_NK = session.run(["logits"], {"clip": clips_NTCHW.numpy()})[0]
        assert np.abs(got_NK - expected_NK.numpy()).max() <= 1e-4 * expected_NK.abs().max()


def test_the_card_has_what_an_application_needs(run: Path) -> None:
    assert export(run, "format=torch") == 0
    folder = run / "export" / "torch-fp32-stream"
    card = json.loads((folder / "model.json").read_text())
    data = (folder / "model.pt2").read_bytes()
    assert card["files"] == {"model.pt2": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    assert (card["schema"], card["format"], card["precision"], card["form"]) == (
        "tsm-model-card/1",
        "torch",
        "fp32",
        "stream",
    )
    assert card["classes"] == CLASSES
    assert card["classes_sha256"] == hashlib.sha256(b"move left\nmove right\nstay\n").hexdigest()
    assert card["pixels"]["mean"] == [123.675, 116.28, 103.53] and card["pixels"]["colour"] == "RGB"
    assert card["pixels"]["resize"]["shorter_side"] == 36 and card["pixels"]["size"] == 32
    assert card["inputs"][0] == {"name": "frame", "shape": ["N", 3, 32, 32], "dtype": "float32"}
    assert card["caches"][0] == {
        "input": "cache_0",
        "output": "next_cache_0",
        "initial": 0.0,
        "module": "layer1.0.conv1",
    }
    assert len(card["caches"]) == 8 and card["outputs"][0]["shape"] == ["N", 3]
    assert card["accuracy"] == [{"step": 5, **ACCURACY}, {"step": 5, **ON_STREAM, "stream": [ROW]}]
    # Other weights than those of stream.json.
    assert accuracy_of(RunFolder(run), 4) == [{"step": 4, **ACCURACY}]
    assert card["check"]["frames"] == 64 and card["check"]["largest_difference"] <= 1e-4
    frames = card["frames"]
    assert (frames["num_frames"], frames["sampling"], frames["distances"]) == (4, "uniform", None)
    assert (frames["frame_rate"], frames["interval_s"]) == (24, 2 / 24) and "no fixed distance" in frames["note"]

    module = torch.export.load(folder / "model.pt2").module()
    caches = [torch.zeros(2, *value["shape"][1:]) for value in card["inputs"][1:]]
    with torch.no_grad():
        network = streaming_network(network_of(run))
        frame_NCHW = frames_of(2, 1)[:, 0]
        logit_NK, _ = network.stream(frame_NCHW, network.initial_caches(2))
        torch.testing.assert_close(module(frame_NCHW, *caches)[0], logit_NK)


class Unshifted(streaming._CachedShift):
    """A shift that the tracer sees without its cache."""

    def __call__(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        (shifted_NCHW,) = super().__call__(module, args)
        return (args[0] if torch.compiler.is_exporting() else shifted_NCHW,)


def test_a_wrong_operator_is_refused_and_leaves_no_file(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run / "export" / "torch-fp32-stream"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.pt2").write_bytes(b"of an earlier export")
    monkeypatch.setattr(streaming, "_CachedShift", Unshifted)
    assert export(run, "format=torch") == 1
    assert "differs from PyTorch" in capsys.readouterr().err
    assert not folder.exists()


def test_a_clip_that_is_shifted_the_wrong_way_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tsm import shift

    right = shift.shift_by_cat
    monkeypatch.setattr(shift, "shift_by_cat", lambda x, fold, offsets: right(x, fold, [-each for each in offsets]))
    assert export(run, "format=torch", "form=clip") == 1
    assert "differs from PyTorch" in capsys.readouterr().err
    assert not (run / "export" / "torch-fp32-clip").exists()


def test_a_file_that_takes_one_batch_only_is_refused() -> None:
    network = exportable(build_network("resnet18", 3, 4, direction="past"), "stream", 32)
    module = network.program(batch=1).module()
    with pytest.raises(ExportError, match="does not run with a batch of 2"):
        largest_difference(network, lambda inputs: list(module(*inputs)), None)
    assert largest_difference(network, lambda inputs: list(module(*inputs)), 1) == 0
    with pytest.raises(ExportError, match="not finite"):
        largest_difference(network, lambda inputs: [output / 0 for output in network.run(inputs)], 1)


def test_a_network_without_caches_streams_too() -> None:
    network = exportable(build_network("resnet18", 3, 4, shift="none"), "stream", 32)
    module = network.program(batch=None).module()
    assert largest_difference(network, lambda inputs: list(module(*inputs)), None) <= 1e-4


def test_what_cannot_be_exported_is_refused_before_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting, fix in (("format=tflite", "Fix: format=onnx or"), ("form=video", "Fix: form=stream or form=clip")):
        assert export(run, setting) == 2
        assert fix in capsys.readouterr().err
    write_run(tmp_path / "offline", CLASSES)
    assert export(tmp_path / "offline", "format=torch") == 2
    assert "form=clip" in capsys.readouterr().err
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs onnx, .*Fix: tools/setup_venv\.sh \.venv onnx"):
        find_format("onnx")


@pytest.mark.slow
@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize("model", ["tsm_mobilenet_v2", "tsm_resnet50_nonlocal"])
def test_clips_in_onnx_have_no_scatter(model: str) -> None:
    """tests/tsm/test_export.py has the other networks, as torch.export traces them."""
    import onnx

    options: Any = OmegaConf.to_container(OmegaConf.load(CHECKOUT / f"conf/model/{model}.yaml"))
    del options["defaults"]
    network = build_network(num_classes=3, **{"num_frames": 4} | options)
    randomise(network)
    onnx_format, clips = find_format("onnx"), exportable(network, "clip", 32)
    files = onnx_format.make(clips)
    operators = {node.op_type for node in onnx.load_from_string(files["model.onnx"]).graph.node}
    assert not any("Scatter" in operator for operator in operators), operators
    assert largest_difference(clips, onnx_format.open(files, clips), None) <= 1e-4


# --- int8 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_with_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A past-only run with its data: the classes have another order in the manifests than in the run."""
    folder = tmp_path_factory.mktemp("with_data")
    for split in ("train", "val"):
        (folder / split).mkdir()
        write_clips(folder / split / "clips.arrow", [smooth_video(seed=seed) for seed in range(6)])
    data = (f"data.root={folder}", "data.train=train/clips.arrow", "data.val=val/clips.arrow")
    write_run(folder / "mine", ["c", "a", "b"], "model.direction=past", *data)
    return folder / "mine"


@pytest.mark.slow
@pytest.mark.usefixtures("onnx_packages")
def test_int8_has_a_scale_per_channel_and_is_scored_on_validation_clips(run_with_data: Path) -> None:
    import onnx

    run = load_trained(str(run_with_data), ["distributed.device=cpu"])
    with torch.no_grad():
        # Sure of one class: int8 is not to be judged on random weights.
        run.network.classifier.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
    folder = command.export(run, command.Kind(precision="int8"), find_format("onnx"))
    check = json.loads((folder / "model.json").read_text())["check"]
    assert check["largest_difference"] <= 1e-4
    # Every third clip is of class a, in the manifest's order the first and in the run's the second.
    assert (check["clips"], check["agreement_percent"]) == (6, 100)
    assert check["top1_percent"] == check["fp32_top1_percent"] == pytest.approx(100 / 3)
    model = onnx.load(folder / "model.onnx")
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    scales = [shapes[node.input[1]] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert (64,) in scales and (512,) in scales
    assert (folder / "model.onnx").stat().st_size < 13e6


def check_int8_is_refused(run_with_data: Path, open_: Callable[[Files, Exportable], Run], message: str) -> None:
    """Export with a format whose float32 file is b"fp32" and int8 file b"int8"; assert the message, and that no file is kept."""
    fake = Format(lambda network: {"model": b"fp32"}, open_, lambda files, network, calls: {"model": b"int8"})
    run = load_trained(str(run_with_data), ["distributed.device=cpu"])
    with pytest.raises(ExportError, match=message):
        command.export(run, command.Kind("fake", "int8"), fake)
    assert not (run_with_data / "export" / "fake-int8-stream").exists()


def test_int8_that_answers_otherwise_is_refused(run_with_data: Path) -> None:
    def open_(files: Files, network: Exportable) -> Run:
        negative = files["model"] == b"int8"
        return lambda inputs: [-value if negative else value for value in network.run(inputs)]

    check_int8_is_refused(run_with_data, open_, r"int8 answers 0\.0 % of 6 validation clips.*no file is kept")


def test_int8_that_does_not_run_is_refused(run_with_data: Path) -> None:
    def open_(files: Files, network: Exportable) -> Run:
        def fail(inputs: list[Tensor]) -> list[Tensor]:
            raise RuntimeError("Init failed for the backend")

        return fail if files["model"] == b"int8" else network.run

    check_int8_is_refused(
        run_with_data, open_, r"int8 file does not run: Init failed for the backend\. Fix: precision=fp32"
    )


def test_int8_without_the_data_set_is_refused(run: Path) -> None:
    fake = Format(
        lambda network: {"model": b""}, lambda files, network: network.run, lambda files, network, calls: files
    )
    with pytest.raises(DataError, match=r"int8 needs clips of the run's data set.*Fix: .*or precision=fp32"):
        command.export(load_trained(str(run), ["distributed.device=cpu"]), command.Kind("fake", "int8"), fake)

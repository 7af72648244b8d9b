"""The benchmark of streams carries caches, pairs its ratios, and lists what it could not measure."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import stream, stream_runtimes
from benchmarks.common import Clock
from benchmarks.stream import Candidate, Key, rows_of
from benchmarks.stream_runtimes import RUNTIMES, calls_without_end
from training.deploy.export import formats
from training.deploy.export.check import ExportError
from training.deploy.export.forms import exportable
from tsm.networks import build_network

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_candidate_carries_caches_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_PAUSE_S", 0)
    network = exportable(build_network("resnet18", 3, 8, direction="past"), "stream", 32)
    given: list[list[Tensor]] = []

    def run(inputs: list[Tensor]) -> list[Tensor]:
        given.append(inputs)
        return [torch.zeros(1, 3), *(cache + 1 for cache in inputs[1:])]

    candidate = Candidate(network, run, torch.contiguous_format)
    assert len(candidate.turn()) == 8 and len(candidate.turn()) == 8
    # One call of each turn is not measured.
    assert [float(inputs[1].max()) for inputs in given] == list(range(18))
    assert not torch.equal(given[0][0], given[1][0]) and torch.equal(given[0][0], given[8][0])


def test_eager_gets_channels_last_frames_of_the_same_values() -> None:
    network = exportable(build_network("resnet18", 3, 4), "clip", 32)
    plain, last = (calls_without_end(network, each) for each in (torch.contiguous_format, torch.channels_last))
    first, other = next(plain), next(last)
    assert torch.equal(first, other) and first.shape == (1, 4, 3, 32, 32)
    assert other.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_ratios_are_paired_within_rounds() -> None:
    # The machine is 10 times slower in every second round.
    slow = [1.0, 10.0] * 4

    def clocks(seconds: float) -> list[list[Clock]]:
        return [[Clock(seconds * each, 3.0 * seconds)] for each in slow]

    stream_key, plain_key = Key("onnx", "fp32", "stream"), Key("onnx", "fp32", "plain")
    eager_key = Key("eager", "fp32", "stream")
    _, row, plain = rows_of({eager_key: clocks(4), stream_key: clocks(2), plain_key: clocks(1)}, {})
    assert row["times_as_fast_as_eager"].low == row["times_as_fast_as_eager"].high == 2
    assert (
        row["relative_to_plain"].median == row["cpu_relative_to_plain"].median == 2 and row["relative_to_TSN"] is None
    )
    assert plain["times_as_fast_as_eager"] is None and row["p95_s"] >= 20 and row["cpu_s"].high == 6


def test_a_file_that_computes_something_else_is_not_measured() -> None:
    network = exportable(build_network("resnet18", 3, 4), "clip", 32)
    right = lambda inputs: network.run(inputs)  # noqa: E731
    wrong = lambda inputs: [2 * output for output in network.run(inputs)]  # noqa: E731
    key, files = Key("onnx", "fp32", "window"), {"model.onnx": b""}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNTIMES, "onnx", stream_runtimes.Runtime(lambda *_: wrong))
        with pytest.raises(ExportError, match="onnx fp32 window differs from PyTorch"):
            stream.open_candidates({key: files}, {"window": network}, 1)
        patch.setitem(RUNTIMES, "onnx", stream_runtimes.Runtime(lambda *_: right))
        found, failed = stream.open_candidates({key: files}, {"window": network}, 1)
        assert list(found) == [key] and not failed

        def broken(inputs: list[Tensor]) -> list[Tensor]:
            raise RuntimeError("Init failed")

        patch.setitem(RUNTIMES, "onnx", stream_runtimes.Runtime(lambda *_: broken))
        found, failed = stream.open_candidates({key: files}, {"window": network}, 1)
        assert not found and failed == {key: "it does not run: Init failed"}


def test_the_program_measures_and_lists_what_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    out = tmp_path / "rows.json"
    options = "--backbone resnet18 --size 32 --window 2 --rounds 2 --threads 1 --runtimes eager openvino"
    monkeypatch.setattr(sys, "argv", ["stream.py", *options.split(), "--json", str(out)])
    assert stream.main() == 0
    seen = capsys.readouterr()
    assert "NOT MEASURED: openvino: format=openvino needs onnx, onnxscript, onnxruntime, openvino, which" in seen.err
    rows = json.loads(out.read_text())
    measured = [row for row in rows if "published" not in row]
    assert [row["network"] for row in measured] == ["stream", "plain", "window", "TSN"]
    for row in measured:
        assert (row["runtime"], row["threads"]) == ("eager", 1) and row["p95_s"] >= row["call_s"]["low"] > 0
        assert "openvino" in row["not_measured"] and row["cpu"]
    # Figures of other devices carry no facts of this machine.
    published = [row for row in rows if "published" in row]
    assert [row["device"] for row in published] == ["Jetson Nano", "Galaxy Note8"]
    assert all(row["published"].startswith("arXiv:") and "cpu" not in row for row in published)

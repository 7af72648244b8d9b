"""Continuous evaluation with a network made by hand, whose logits follow from the grey levels of the last three frames."""

import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distributed.backends.base import Group
from distributed.backends.single import SingleBackend
from distributed.topology import Topology
from pipelines.loading.clips import ClipSource, EvaluationClips
from pipelines.loading.worker_loader import ClipLoader
from pipelines.stream.continuous import BEGINNINGS_PERCENT
from pipelines.stream.eval_views import EvalProtocol
from tests.helpers.clips import write_clips
from training.config.schema import EvaluationConfig, ModelConfig
from training.errors import ConfigError
from training.evaluation.beginnings import evaluate_beginnings
from training.evaluation.continuous import StreamAnswers, evaluate_stream
from training.evaluation.stream_command import streamable
from training.evaluation.stream_record import clip_curve, network_kind, stream_rows
from tsm.networks import build_network

CPU = torch.device("cpu")

LENGTHS = [7, 1, 9, 3, 5]
# The order of five clips, which goes round: clip 0 follows clip 2.
CIRCLE = [0, 4, 3, 1, 2]
# Grey levels are so many apart, more than what the encoder changes.
STEP = 8


def code(row: int, frame: int) -> int:
    """Return the number, from 1 to 25, that the grey level of a frame stands for. No two frames have the same."""
    return 1 + sum(LENGTHS[:row]) + frame


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    levels = [np.array([STEP * code(row, frame) for frame in range(count)]) for row, count in enumerate(LENGTHS)]
    write_clips(
        folder / "val.arrow",
        [
            np.broadcast_to(level_T[:, None, None, None], (len(level_T), 32, 32, 3)).astype(np.uint8)
            for level_T in levels
        ],
    )
    return folder


def codes_of(x_NCHW: Tensor) -> Tensor:
    return (x_NCHW.double().mean((1, 2, 3)) / STEP).round().long()


TABLE = torch.randn(27, 27, 27, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
"""Logits by the codes of a frame and of the two before it; before a stream's first frame the code is 26."""


class ByHand(nn.Module):
    """A streaming network with two caches, the code of the frame before and that of the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def initial_caches(self, batch: int, frame_size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        return torch.full((batch, 1), 26), torch.full((batch, 1), 26)

    def stream(self, x_NCHW: Tensor, caches: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        code_N, (before_N1, earlier_N1) = codes_of(x_NCHW), caches
        return TABLE[code_N, before_N1[:, 0], earlier_N1[:, 0]], (code_N[:, None], before_N1)


class OneOf(SingleBackend):
    """Rank `rank` of a world without reduction: the test sums the ranks' parts itself."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(Topology("none", rank, size, rank, size, 0, "host"), CPU)

    def all_reduce_(self, x: Tensor, name: str, group: Group | None = None) -> None:
        pass


def stream(
    folder: Path,
    batch: int,
    distances: list[int],
    rank: int = 0,
    size: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> StreamAnswers:
    clips = EvaluationClips(ClipSource(folder / "val.arrow", "pyav"), EvalProtocol(8, 28, "stream"))
    settings = EvaluationConfig(batch=batch, distances=distances)
    network: Any = ByHand()
    return evaluate_stream(network, lambda x: x, clips, ClipLoader(clips, 0, 2), OneOf(rank, size), settings, progress)


def expected(distance: int, black: tuple[int, ...] = ()) -> Tensor:
    """Predictions (N, P, R) from one endless stream, computed frame by frame; clips `black` show black frames."""
    frames = [(row, frame) for row in CIRCLE for frame in range(0, LENGTHS[row], distance)]
    codes = [0 if row in black else code(row, frame) for row, frame in frames * 12]
    logits = [TABLE[now, before, earlier] for earlier, before, now in zip(codes, codes[1:], codes[2:], strict=False)]
    last_round = len(codes) - len(frames)
    predicted = torch.zeros(len(LENGTHS), 10, 3, dtype=torch.int32)
    for row, count in enumerate(LENGTHS):
        for part, percent in enumerate(BEGINNINGS_PERCENT):
            seen = [frame for frame in range(0, count, distance) if frame < count * percent / 100]
            # Logits begin with the third frame.
            at = last_round + frames.index((row, seen[-1])) - 2
            for reading, window in enumerate((1, 4, 8)):
                predicted[row, part, reading] = sum(logits[at - window + 1 : at + 1]).argmax()  # type: ignore[union-attr]
    return predicted


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (2, 1), (8, 1), (1, 2), (2, 2), (1, 3), (4, 2)])
def test_predictions_are_those_of_one_endless_stream(made: Path, batch: int, size: int) -> None:
    """Whatever the number of streams and of ranks, also if there are more streams than clips."""
    distances = [1, 5, 2]
    parts = [stream(made, batch, distances, rank, size) for rank in range(size)]
    found_NDPR = torch.stack([part.predicted_NDPR for part in parts]).sum(0)
    assert torch.stack([part.seen_N for part in parts]).sum(0).tolist() == [1] * len(LENGTHS)
    for number, distance in enumerate(distances):
        assert found_NDPR[:, number].equal(expected(distance)), distance


def test_each_clip_and_frame_is_progress(made: Path) -> None:
    """A long clip must not look like a hang: one stream of five clips of 25 frames, and of burn-in before them."""
    calls: list[int] = []
    stream(made, 1, [1, 2], progress=calls.append)
    # Before clip 0, at distance 2, nine frames: clips 2, 1 and 3 have 5 + 1 + 2, and clip 4 has 3 more.
    clips = [4, 3, 1, 2, *CIRCLE]
    frames = sum(LENGTHS[row] + -(-LENGTHS[row] // 2) for row in clips)
    assert calls == list(range(1, 1 + len(clips) + frames))


def test_the_readings_differ() -> None:
    """Otherwise the test above could not tell them apart, nor distances, nor parts of a clip."""
    assert (
        len({expected(distance)[:, :, reading].numpy().tobytes() for distance in (1, 2, 5) for reading in range(3)})
        == 9
    )
    assert any(one.ne(other).any() for one, other in pairwise(expected(1)[2]))


def test_a_clip_of_one_frame_is_read_with_the_clips_before_it(made: Path) -> None:
    """Clip 1 has one frame and follows clip 3 of three, which follows clip 4: no cache is reset, and windows go on."""
    answers = stream(made, 1, [1])
    before = [(4, 1), (4, 2), (4, 3), (4, 4), (3, 0), (3, 1), (3, 2), (1, 0)]
    codes = [code(0, 5), code(0, 6), code(4, 0)] + [code(row, frame) for row, frame in before]
    logits = [TABLE[codes[at], codes[at - 1], codes[at - 2]] for at in range(3, 11)]
    assert answers.predicted_NDPR[1, 0, 0].tolist() == [
        logits[-1].argmax(),
        torch.stack(logits[-4:]).mean(0).argmax(),
        torch.stack(logits).mean(0).argmax(),
    ]
    # One frame is seen after any part of it.
    assert (answers.predicted_NDPR[1, 0] == answers.predicted_NDPR[1, 0, 0]).all()


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (2, 2)])
def test_a_broken_clip_is_missing_and_black(made: Path, tmp_path: Path, batch: int, size: int) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "clips"))
    os.truncate(folder / "4.mp4", 100)
    parts = [stream(folder, batch, [1, 2], rank, size) for rank in range(size)]
    assert torch.stack([part.seen_N for part in parts]).sum(0).tolist() == [1, 1, 1, 1, 0]
    assert [record.row for part in parts for record in part.missing] == [4]
    found_NDPR = torch.stack([part.predicted_NDPR for part in parts]).sum(0)
    for number, distance in enumerate((1, 2)):
        assert found_NDPR[:4, number].equal(expected(distance, black=(4,))[:4])


def test_rows_of_the_table() -> None:
    """Percentages of the decoded clips only, at the end of clips and after each part."""
    predicted_NDPR = torch.zeros(4, 2, 10, 3, dtype=torch.int32)
    label_N, seen_N = torch.tensor([0, 1, 1, 0]), torch.tensor([True, True, True, False])
    predicted_NDPR[1, 1, 9, 1] = 1
    predicted_NDPR[1:3, 1, 9, 2] = 1
    predicted_NDPR[2, 1, 4:, 0] = 1
    one, three = stream_rows(StreamAnswers(predicted_NDPR, seen_N, []), label_N, np.array([24, 25, 5, 1]), [1, 3])
    assert (one["distance"], one["frames_per_clip"], one["clips_shorter_than_8"]) == (1, 13.75, 2)
    assert (three["distance"], three["frames_per_clip"], three["clips_shorter_than_8"]) == (3, 5.0, 2)
    assert [one[f"{name}_percent"] for name in ("last_frame", "mean_of_4", "mean_of_8")] == pytest.approx([100 / 3] * 3)
    assert [three[f"{name}_percent"] for name in ("last_frame", "mean_of_4", "mean_of_8")] == pytest.approx(
        [200 / 3, 200 / 3, 100]
    )
    assert three["early_percent"]["last_frame"] == pytest.approx([100 / 3] * 4 + [200 / 3] * 6)
    assert three["early_percent"]["mean_of_8"] == pytest.approx([100 / 3] * 9 + [100])


class Last(nn.Module):
    """A clip network whose class follows from the code of the last frame that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x_NTCHW: Tensor) -> Tensor:
        return nn.functional.one_hot(codes_of(x_NTCHW[:, -1]) % 3, 3).double()


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (30, 1), (7, 2)])
def test_predictions_from_the_beginnings_of_clips(made: Path, batch: int, size: int) -> None:
    """Of the frames that were seen, three quarters are before the last of two sampled ones, rounded down."""
    clips = EvaluationClips(ClipSource(made / "val.arrow", "pyav"), EvalProtocol(2, 28, "uniform_beginnings"))
    parts = [
        evaluate_beginnings(
            Last(), lambda x: x, clips, ClipLoader(clips, 0, 2), OneOf(rank, size), EvaluationConfig(batch=batch)
        )
        for rank in range(size)
    ]
    found_NV = torch.stack(parts).sum(0)
    for row, count in enumerate(LENGTHS):
        seen = [-(-count * percent // 100) for percent in BEGINNINGS_PERCENT]
        assert found_NV[row].tolist() == [code(row, frames * 3 // 4) % 3 for frames in seen]
    label_N, seen_N = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([True, True, False, True, True])
    curve = clip_curve("run", 5, ModelConfig(num_frames=2), found_NV, label_N, seen_N)
    right_N = [int(found_NV[row, 9] == label) for row, label in enumerate(label_N) if row != 2]
    assert curve["top1_percent"][9] == 25 * sum(right_N)
    assert (curve["source"], curve["step"], curve["network"], curve["num_frames"]) == ("run", 5, "TSM", 2)


def test_kinds_of_networks() -> None:
    assert network_kind(ModelConfig(shift="none")) == "TSN"
    assert network_kind(ModelConfig(direction="past")) == "online TSM"
    assert network_kind(ModelConfig()) == "TSM"


def test_a_network_that_needs_later_frames_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^evaluation=stream: .*'both'.* Fix: .*model\.direction=past"):
        streamable(build_network("resnet18", 3))
    assert len(streamable(build_network("resnet18", 3, direction="past")).initial_caches(1)) == 8

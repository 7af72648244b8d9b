"""evaluate.py --explain: which clips a page shows, and what it says of the order of their frames."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.loading.clips import ClipSource, EvaluationClips
from pipelines.stream.eval_views import EvalProtocol
from tests.helpers.clips import write_clips
from training.build.normalise import Normaliser
from training.config.command_line import parse
from training.config.schema import EvaluationConfig, NumericsConfig
from training.errors import ConfigError
from training.evaluation.explain import choose_rows, explain_clips, shuffled_orders
from training.evaluation.metrics import ClipLogits
from training.report.explain_page import ShownClip, write_explain_page
from tsm.networks import build_network

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 16])
def test_shuffles_are_neither_the_order_nor_its_reverse(num_frames: int) -> None:
    orders = [tuple(order.tolist()) for order in shuffled_orders(num_frames)]
    forward = tuple(range(num_frames))
    assert all(tuple(sorted(order)) == forward and order not in (forward, forward[::-1]) for order in orders)
    assert len(orders) == len(set(orders)) == {1: 0, 2: 0, 3: 4}.get(num_frames, 8)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> EvaluationClips:
    """Three clips, the second of which is broken."""
    manifest = tmp_path_factory.mktemp("clips") / "val.arrow"
    rng = np.random.default_rng(0)
    # Each frame has a colour of its own, so that their order matters even to random weights.
    noise = [rng.integers(0, 128, (9, 40, 40, 3)) + rng.integers(0, 128, (9, 1, 1, 3)) for _ in range(3)]
    write_clips(manifest, [video_THWC.astype(np.uint8) for video_THWC in noise])
    broken = manifest.with_name("1.mp4")
    broken.write_bytes(bytes(broken.stat().st_size))
    return EvaluationClips(ClipSource(manifest, "pyav"), EvalProtocol(5, 32, "twice"))


@pytest.mark.parametrize("shift", ["residual", "none"])
def test_only_a_temporal_network_depends_on_the_order(clips: EvaluationClips, shift: str) -> None:
    torch.manual_seed(0)
    network = build_network("resnet18", 3, num_frames=5, shift=shift)  # type: ignore[arg-type]
    normalise = Normaliser(CPU, NumericsConfig())
    # One view at a time: a clip has two.
    calls: list[None] = []
    shown = list(
        explain_clips(network, normalise, clips, [0, 1, 2], CPU, EvaluationConfig(batch=1), lambda: calls.append(None))
    )
    # The monitor hears of each forward pass: as it is, reversed, 8 shuffles.
    assert len(calls) == 2 * 10
    assert [(clip.name, clip.true_class) for clip in shown] == [("0.mp4", "a"), ("2.mp4", "c")]
    (video_VTCHW, *_), *_ = clips.clips((np.array([0]), np.array([True])))[0]
    with torch.inference_mode():
        by_hand_K = network.eval()(normalise(video_VTCHW.flip(1))).mean(0)
    assert torch.equal(shown[0].frame_TCHW, video_VTCHW[0])
    torch.testing.assert_close(shown[0].reversed_K, by_hand_K, rtol=1e-4, atol=1e-5)
    for clip in shown:
        for other_K in (clip.reversed_K, *clip.shuffled_SK):
            change = float((other_K - clip.as_is_K).abs().max())
            assert change < 1e-5 if shift == "none" else change > 1e-4


def test_the_surest_mistakes_and_right_answers_of_many_classes_are_shown() -> None:
    label_N = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    answer_N = torch.tensor([0, 0, 1, 0, 2, 0, 1, 1])
    sure_N = torch.tensor([5.0, 6.0, 5.0, 1.0, 5.0, 3.0, 2.0, 5.0])
    logit_NK = torch.zeros(8, 3).scatter(1, answer_N[:, None], sure_N[:, None])
    seen_N = torch.tensor([True] * 7 + [False])
    logits = ClipLogits(logit_NK, label_N, seen_N)
    # Mistakes: rows 5 (surest), 6 and 3. Right: rows 0 and 1 of class 0, 2 of class 1, 4 of class 2.
    assert choose_rows(logits, 4) == [5, 6, 0, 2]
    assert choose_rows(logits, 5) == [5, 6, 0, 2, 4]
    assert choose_rows(logits, 100) == [5, 6, 3, 0, 2, 4, 1]
    assert choose_rows(logits, 1) == [0]
    assert choose_rows(ClipLogits(logit_NK, label_N, ~seen_N & False), 4) == []


def test_the_page_needs_no_other_file_and_escapes_names(tmp_path: Path) -> None:
    frame_TCHW = torch.randint(256, (4, 3, 20, 30), dtype=torch.uint8)
    sure_K, other_K = torch.tensor([5.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 0.0])
    clips = [
        ShownClip("a<b>.mp4", "up", frame_TCHW, sure_K, other_K, torch.stack([sure_K, other_K, other_K])),
        ShownClip("c.mp4", None, frame_TCHW, other_K, other_K, torch.zeros(0, 3)),
    ]
    write_explain_page(tmp_path / "page.html", "mine", "step 5", clips, ["up", "down & <out>", "x"])
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 8
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "a&lt;b&gt;.mp4" in text and "<out>" not in text and "<b>.mp4" not in text
    assert "<b>1 of 2</b><span>answers that change when the frames are reversed" in text
    assert "<b>2 of 3</b><span>answers that change when they are shuffled" in text
    assert "down &amp; &lt;out&gt; (2 of 3), up (1 of 3)" in text
    # The clip whose class is known.
    assert text.count('class="tag right"') == 1


def test_the_flag_is_evaluates_and_a_number_of_clips_counts() -> None:
    assert parse("evaluate", ["--run", "x", "--explain"]).overrides == ["evaluation.explain=12"]
    assert parse("evaluate", ["evaluation.explain=3", "--explain"]).overrides[-1] == "evaluation.explain=3"
    with pytest.raises(ConfigError, match=r"--explain\. Fix: python train\.py --help"):
        parse("train", ["--explain"])

"""Scores agree with naive counting, clip by clip."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.evaluation.metrics import ClipLogits, Scores, confusion_matrix, scores_of


def random_logits(n: int, classes: int, seed: int) -> ClipLogits:
    """Random logits of clips, of which some are missing."""
    generator = torch.Generator().manual_seed(seed)
    logit_NK = 3 * torch.randn(n, classes, generator=generator)
    label_N = torch.randint(classes, (n,), generator=generator)
    return ClipLogits(logit_NK, label_N, torch.rand(n, generator=generator) < 0.7)


def naive(clip_logits: ClipLogits, groups: list[int]) -> dict[str, Any]:
    """Compute the scores clip by clip with Python numbers."""
    loss, right, right5, in_group, clips = 0.0, 0, 0, 0, 0
    by_class: dict[int, list[bool]] = {}
    bins: dict[int, list[tuple[float, bool]]] = {}
    everything = (clip_logits.logit_NK.tolist(), clip_logits.label_N.tolist(), clip_logits.seen_N.tolist())
    for logit_K, label, seen in zip(*everything, strict=True):
        if not seen:
            continue
        ranking = sorted(range(len(logit_K)), key=lambda k: -logit_K[k])
        p_K = torch.tensor(logit_K, dtype=torch.float64).softmax(0).tolist()
        clips += 1
        right += ranking[0] == label
        right5 += label in ranking[:5]
        in_group += groups[ranking[0]] == groups[label]
        by_class.setdefault(label, []).append(ranking[0] == label)
        loss -= torch.tensor(p_K[label], dtype=torch.float64).log().item()
        bins.setdefault(int(15 * p_K[ranking[0]]), []).append((p_K[ranking[0]], ranking[0] == label))
    recalls = [sum(answers) / len(answers) for answers in by_class.values()]
    gaps = [abs(sum(p for p, _ in answers) - sum(right for _, right in answers)) for answers in bins.values()]
    return {
        "clips": clips,
        "missing": len(clip_logits.seen_N) - clips,
        "loss": loss / max(1, clips),
        "top1_percent": 100 * right / max(1, clips),
        "top5_percent": 100 * right5 / max(1, clips),
        "mean_class_percent": 100 * sum(recalls) / max(1, len(recalls)),
        "calibration_error_percent": 100 * sum(gaps) / max(1, clips),
        "order_group_percent": 100 * in_group / max(1, clips),
    }


@given(n=st.integers(1, 60), classes=st.integers(2, 12), seed=st.integers(0, 10_000))
@settings(max_examples=60)
def test_scores_are_those_of_naive_counting(n: int, classes: int, seed: int) -> None:
    clip_logits = random_logits(n, classes, seed)
    groups = [label // 2 for label in range(classes)]
    assert scores_of(clip_logits, groups).as_dict() == pytest.approx(naive(clip_logits, groups), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("garbage", [0.0, 1e30, float("inf"), float("nan")])
def test_missing_clips_are_never_counted(garbage: float) -> None:
    clip_logits = random_logits(10, 7, 0)
    seen_N = torch.arange(10) < 6
    expected = scores_of(ClipLogits(clip_logits.logit_NK[:6], clip_logits.label_N[:6], seen_N[:6]), None)
    clip_logits.logit_NK[6:] = garbage
    scores = scores_of(ClipLogits(clip_logits.logit_NK, clip_logits.label_N, seen_N), None)
    assert scores.as_dict() == {**expected.as_dict(), "missing": 4}


def test_reference_values() -> None:
    """Four clips of three classes: two correct, one wrong within its group, one wrong in another group."""
    answer_N, label_N = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 0, 1])
    logit_NK = 100 * torch.nn.functional.one_hot(answer_N, 3).double()
    clip_logits = ClipLogits(logit_NK, label_N, torch.ones(4, dtype=torch.bool))
    scores = scores_of(clip_logits, [0, 0, 1])
    assert (scores.clips, scores.missing, scores.top1_percent, scores.top5_percent) == (4, 0, 50.0, 100.0)
    assert scores.mean_class_percent == pytest.approx(100 * (2 / 3 + 0) / 2, rel=1e-12)
    assert scores.order_group_percent == 75.0
    assert scores.loss == pytest.approx((100 + 100) / 4)
    # Confidence is always 1, and half of the clips are correct.
    assert scores.calibration_error_percent == pytest.approx(50)
    assert confusion_matrix(clip_logits).tolist() == [[2, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_without_groups_there_is_no_score_of_them() -> None:
    scores = scores_of(random_logits(10, 7, 0), None)
    assert scores.order_group_percent is None
    assert "order_group_percent" not in scores.as_dict()


def test_nothing_seen_is_no_error() -> None:
    clip_logits = random_logits(4, 7, 0)
    nothing = ClipLogits(clip_logits.logit_NK, clip_logits.label_N, torch.zeros(4, dtype=torch.bool))
    assert scores_of(nothing, [0] * 7) == Scores(0, 4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert scores_of(nothing, None).order_group_percent is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_diverged_gets_scores(value: float) -> None:
    clip_logits = random_logits(10, 7, 0)
    clip_logits.logit_NK[3] = value
    scores = scores_of(clip_logits, None)
    assert scores.clips == int(clip_logits.seen_N.sum())
    assert not scores.loss < float("inf")


def test_logits_between_0_and_1_are_no_probabilities() -> None:
    """The calibration error uses the softmax: that of (1, 0) is (0.73, 0.27)."""
    logit_NK = torch.tensor([[1.0, 0.0]])
    scores = scores_of(ClipLogits(logit_NK, torch.tensor([0]), torch.tensor([True])), None)
    assert scores.calibration_error_percent == pytest.approx(26.894, abs=1e-3)


def test_half_precision_logits_are_summed_in_double() -> None:
    """A thousand losses of 1e-3 and one of 1e4: a float16 sum would lose the small ones or overflow."""
    logit_NK = torch.zeros(1001, 2, dtype=torch.float16)
    logit_NK[:-1, 0], logit_NK[-1, 1] = 7.0, 10_000.0
    label_N = torch.zeros(1001, dtype=torch.int64)
    scores = scores_of(ClipLogits(logit_NK, label_N, torch.ones(1001, dtype=torch.bool)), None)
    small = torch.tensor(1 + torch.tensor(-7.0, dtype=torch.float64).exp().item(), dtype=torch.float64).log().item()
    assert scores.loss == pytest.approx((1000 * small + 10_000) / 1001, rel=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits its address space as Linux does")
def test_as_many_clips_and_classes_as_kinetics_fit_in_deterministic_mode() -> None:
    """The scores need at most 4 GiB beyond the libraries, and only seconds."""
    code = """
import resource
import torch
from training.evaluation.metrics import ClipLogits, scores_of
import torchmetrics.functional.classification
torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)
taken = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 30),) * 2)
label_N = torch.arange(20_000) % 400
logit_NK = torch.nn.functional.one_hot(label_N.roll(1), 400).float()
scores = scores_of(ClipLogits(logit_NK, label_N, label_N >= 0), None)
assert (scores.clips, scores.top1_percent) == (20_000, 0.0), scores
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]

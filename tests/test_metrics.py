"""Evaluation counts against naive counting."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distributed.backend import Group, SingleBackend
from distributed.topology import Topology
from training.metrics import Counter, Scores

CPU = torch.device("cpu")
SINGLE = SingleBackend(Topology("none", 0, 1, 0, 1, 0, "host"), CPU)


def batch(n: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random `(logit_NK, label_N, real_N)`."""
    generator = torch.Generator().manual_seed(seed)
    logit_NK = 3 * torch.randn(n, classes, generator=generator)
    label_N = torch.randint(classes, (n,), generator=generator)
    return logit_NK, label_N, torch.rand(n, generator=generator) < 0.7


def scores_of(*batches: tuple[Tensor, Tensor, Tensor], groups: list[int] | None = None, missing: int = 0) -> Scores:
    counter = Counter(batches[0][0].shape[1], CPU)
    for logit_NK, label_N, real_N in batches:
        counter.add(logit_NK, label_N, real_N, missing)
    return counter.scores(SINGLE, groups)


def naive(batches: list[tuple[Tensor, Tensor, Tensor]], groups: list[int]) -> dict[str, Any]:
    """Clip by clip."""
    loss, right, right5, in_group, clips = 0.0, 0, 0, 0, 0
    by_class: dict[int, list[bool]] = {}
    for logit_NK, label_N, real_N in batches:
        for logit_K, label, real in zip(logit_NK.tolist(), label_N.tolist(), real_N.tolist(), strict=True):
            if not real:
                continue
            ranking = sorted(range(len(logit_K)), key=lambda k: -logit_K[k])
            clips += 1
            right += ranking[0] == label
            right5 += label in ranking[:5]
            in_group += groups[ranking[0]] == groups[label]
            by_class.setdefault(label, []).append(ranking[0] == label)
            loss -= torch.tensor(logit_K, dtype=torch.float64).log_softmax(0)[label].item()
    recalls = [sum(answers) / len(answers) for answers in by_class.values()]
    return {
        "clips": clips,
        "loss": loss / max(1, clips),
        "top1_percent": 100 * right / max(1, clips),
        "top5_percent": 100 * right5 / max(1, clips),
        "mean_class_percent": 100 * sum(recalls) / max(1, len(recalls)),
        "order_group_percent": 100 * in_group / max(1, clips),
    }


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4), classes=st.integers(2, 12), seed=st.integers(0, 10_000)
)
@settings(max_examples=60, deadline=None)
def test_scores_are_those_of_naive_counting(sizes: list[int], classes: int, seed: int) -> None:
    batches = [batch(n, classes, seed + number) for number, n in enumerate(sizes)]
    groups = [label // 2 for label in range(classes)]
    scores = scores_of(*batches, groups=groups).as_dict()
    expected = naive(batches, groups)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-6)


@given(seed=st.integers(0, 10_000), cut=st.integers(1, 29))
@settings(max_examples=30, deadline=None)
def test_batches_can_be_cut_anywhere(seed: int, cut: int) -> None:
    logit_NK, label_N, real_N = batch(30, 7, seed)
    whole = scores_of((logit_NK, label_N, real_N))
    parts = [(logit_NK[part], label_N[part], real_N[part]) for part in (slice(cut), slice(cut, None))]
    assert scores_of(*parts).as_dict() == pytest.approx(whole.as_dict())


@pytest.mark.parametrize("garbage", [0.0, 1e30, float("inf"), float("nan")])
def test_padding_is_never_counted(garbage: float) -> None:
    logit_NK, label_N, _ = batch(10, 7, 0)
    real_N = torch.arange(10) < 6
    expected = scores_of((logit_NK[:6], label_N[:6], real_N[:6]))
    logit_NK[6:] = garbage
    assert scores_of((logit_NK, label_N, real_N)) == expected


def test_reference_values() -> None:
    """Four clips of three classes: two right, one wrong within its group, one wrong outside of it."""
    answer_N, label_N = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 0, 1])
    logit_NK = 100 * torch.nn.functional.one_hot(answer_N, 3).double()
    scores = scores_of((logit_NK, label_N, torch.ones(4, dtype=torch.bool)), groups=[0, 0, 1])
    assert (scores.clips, scores.top1_percent, scores.top5_percent) == (4, 50.0, 100.0)
    assert scores.mean_class_percent == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert scores.order_group_percent == 75.0
    assert scores.loss == pytest.approx((100 + 100) / 4)


def test_missing_clips_are_summed_and_not_counted() -> None:
    logit_NK, label_N, real_N = batch(10, 7, 0)
    real_N[:] = True
    real_N[:2] = False
    scores = scores_of((logit_NK, label_N, real_N), (logit_NK, label_N, real_N), missing=2)
    assert (scores.clips, scores.missing) == (16, 4)


def test_without_groups_there_is_no_score_of_them() -> None:
    scores = scores_of(batch(10, 7, 0))
    assert scores.order_group_percent is None
    assert "order_group_percent" not in scores.as_dict()


def test_nothing_real_is_no_error() -> None:
    logit_NK, label_N, _ = batch(4, 7, 0)
    scores = scores_of((logit_NK, label_N, torch.zeros(4, dtype=torch.bool)), groups=[0] * 7)
    assert scores == Scores(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_half_precision_logits_are_summed_in_double() -> None:
    """A thousand losses of 1e-3 and one of 1e4: a float16 sum would lose the former or overflow."""
    logit_NK = torch.zeros(1001, 2, dtype=torch.float16)
    logit_NK[:-1, 0], logit_NK[-1, 1] = 7.0, 10_000.0
    label_N = torch.zeros(1001, dtype=torch.int64)
    scores = scores_of((logit_NK, label_N, torch.ones(1001, dtype=torch.bool)))
    small = torch.tensor(1 + torch.tensor(-7.0, dtype=torch.float64).exp().item(), dtype=torch.float64).log().item()
    assert scores.loss == pytest.approx((1000 * small + 10_000) / 1001, rel=1e-9)


class Twins(SingleBackend):
    """A world of two ranks that counted the same."""

    def all_reduce_(self, x: Tensor, name: str, group: Group | None = None) -> None:
        x.mul_(2)


def test_counts_of_all_ranks_are_joined_and_ones_own_stay() -> None:
    counter = Counter(7, CPU)
    counter.add(*batch(10, 7, 0), 1)
    alone = counter.scores(SINGLE, None)
    for _ in range(2):
        joined = counter.scores(Twins(SINGLE.topology, CPU), None)
        assert (joined.clips, joined.missing) == (2 * alone.clips, 2)
        assert joined.loss == pytest.approx(alone.loss)
        assert joined.top5_percent == alone.top5_percent
    assert counter.scores(SINGLE, None) == alone

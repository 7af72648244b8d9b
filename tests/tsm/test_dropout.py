"""Dropout with one mask per clip, and its counter-based random numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsm.dropout import ClipDropout, uniform_of

SEEDS = torch.tensor([5, 6, 1 << 40, (1 << 63) - 1])


def dropped(seed_N: Tensor | None, x_NTC: Tensor, p: float = 0.5) -> Tensor:
    dropout = ClipDropout(p).train()
    dropout.seed_N = seed_N
    out_NTC: Tensor = dropout(x_NTC)
    return out_NTC


# --- Masks ------------------------------------------------------------------------------------------------------------


@given(order=st.permutations(range(4)), cut=st.integers(1, 3))
@settings(max_examples=20)
def test_a_mask_belongs_to_its_seed_wherever_the_clip_lies(order: list[int], cut: int) -> None:
    x_NTC = torch.rand(4, 3, 16) + 1
    whole = dropped(SEEDS, x_NTC)
    parts = [dropped(SEEDS[part], x_NTC[part]) for part in (order[:cut], order[cut:])]
    assert torch.equal(torch.cat(parts), whole[order])


def test_clips_and_frames_have_different_masks() -> None:
    kept_NTC = dropped(SEEDS, torch.ones(4, 3, 64)) > 0
    rows = {tuple(row.tolist()) for row in kept_NTC.flatten(0, 1)}
    assert len(rows) == 4 * 3


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_keep_rate(p: float) -> None:
    kept = (dropped(torch.arange(1, 21), torch.ones(20, 8, 512), p) > 0).float().mean().item()
    # Four standard deviations of the mean of 81,920 samples.
    assert kept == pytest.approx(1 - p, abs=0.006)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_what_is_kept_is_scaled(p: float) -> None:
    x_NTC = torch.rand(4, 2, 64, dtype=torch.float64) + 1
    out_NTC = dropped(SEEDS, x_NTC, p)
    kept_NTC = out_NTC != 0
    torch.testing.assert_close(out_NTC[kept_NTC], x_NTC[kept_NTC] / (1 - p))


def test_the_gradient_has_the_same_mask() -> None:
    x_NTC = torch.ones(4, 2, 16, requires_grad=True)
    out_NTC = dropped(SEEDS, x_NTC)
    out_NTC.sum().backward()
    assert x_NTC.grad is not None
    assert torch.equal(x_NTC.grad, out_NTC.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_type_of_number_stays_and_does_not_change_the_mask(dtype: torch.dtype) -> None:
    out_NTC = dropped(SEEDS, torch.ones(4, 2, 16, dtype=dtype))
    assert out_NTC.dtype == dtype
    assert torch.equal(out_NTC > 0, dropped(SEEDS, torch.ones(4, 2, 16)) > 0)


def test_evaluation_is_the_identity() -> None:
    dropout = ClipDropout(0.5).eval()
    dropout.seed_N = SEEDS
    x_NTC = torch.rand(4, 3, 16)
    assert torch.equal(dropout(x_NTC), x_NTC)


def test_p_of_zero_is_the_identity() -> None:
    x_NTC = torch.rand(4, 3, 16)
    assert torch.equal(dropped(SEEDS, x_NTC, p=0.0), x_NTC)


def test_torchs_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    dropped(SEEDS, torch.ones(4, 2, 16))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_seeds_it_is_torchs_dropout() -> None:
    x_NTC = torch.rand(4, 3, 16)
    torch.manual_seed(3)
    expected = torch.nn.Dropout(0.3).train()(x_NTC)
    torch.manual_seed(3)
    assert torch.equal(dropped(None, x_NTC, 0.3), expected)


@pytest.mark.parametrize("count", [3, 5])
def test_a_wrong_number_of_seeds_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} dropout seeds .* 4 clips"):
        dropped(torch.arange(count), torch.ones(4, 2, 16))


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0])
def test_an_impossible_p_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="dropout"):
        ClipDropout(p)


# --- Random numbers ---------------------------------------------------------------------------------------------------


def test_golden_numbers() -> None:
    """Changed numbers would break resumed runs, which would continue with other masks."""
    numbers = uniform_of(torch.tensor([1, (1 << 40) + 5, (1 << 63) - 1]), 3) * (1 << 24)
    assert numbers.long().tolist() == GOLDEN


GOLDEN = [[5707513, 9946965, 14516923], [10643848, 4397155, 5630223], [15818151, 16091793, 3787414]]


def test_a_number_depends_on_its_place_alone() -> None:
    assert torch.equal(uniform_of(SEEDS, 10), uniform_of(SEEDS, 1000)[:, :10])


def test_numbers_are_uniform() -> None:
    numbers = uniform_of(torch.arange(1, 101), 10_000).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(1 / 2, abs=2e-3)
    assert numbers.var().item() == pytest.approx(1 / 12, abs=1e-3)
    counts = torch.histc(numbers, bins=64, min=0, max=1)
    expected = numbers.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5


@pytest.mark.parametrize("bit", [0, 1, 20, 31, 32, 50, 62])
def test_neighbouring_seeds_are_not_correlated(bit: int) -> None:
    """Seeds that differ in one bit, in either half of the seed."""
    seed = 0x1234_5678_9ABC_DEF0
    numbers = uniform_of(torch.tensor([seed, seed ^ (1 << bit)]), 40_000).double()
    correlation = torch.corrcoef(numbers)[0, 1].item()
    assert abs(correlation) < 5 / 40_000**0.5


def test_neighbouring_places_are_not_correlated() -> None:
    numbers = uniform_of(SEEDS, 40_000).double()
    for lag in (1, 2, 8, 512, 2048):
        correlation = torch.corrcoef(torch.stack([numbers[:, lag:].flatten(), numbers[:, :-lag].flatten()]))[0, 1]
        assert abs(correlation.item()) < 5 / 160_000**0.5


def test_both_halves_of_a_seed_have_a_part_of_their_own() -> None:
    """Swapping the halves gives another seed, and seeds with equal halves differ too."""
    low, high = 0x1234_5678, 0x0ABC_DEF1
    seeds = torch.tensor([high << 32 | low, low << 32 | high, low << 32 | low, high << 32 | high])
    rows = {tuple(row.tolist()) for row in uniform_of(seeds, 4)}
    assert len(rows) == len(seeds)

"""Traps of Horovod and DDP, with the test of each remedy; the tests in this file need no second process.

Worlds are the processes of test_worlds.py, over Gloo and MPI. These tests fail when the remedy is removed:
channels_last, bf16, micro-steps, loss scale, pre-scaling, DDP's buckets, early exit. Fusion by arrival order is the
exception: without fixed groups, 4 ranks on one machine also repeated bit for bit, because tensors arrived in the same
order. Its test only shows that the remedy is harmless.

| trap | remedy | test |
|---|---|---|
| Horovod refuses channels_last gradients | a contiguous view in the compressor | below; test_worlds: gradients_that_horovod_cannot_take, weights_after_20_steps[whole_world] |
| Horovod does not reduce bf16 | reduction in fp32 | below; test_worlds: gradients_that_horovod_cannot_take |
| Horovod refuses zero_grad(set_to_none=True) | the training loop uses the plain optimizer | test_worlds: gradients_that_horovod_cannot_take, and every training run |
| Horovod rebuilds an optimizer's class from `params` only | Horovod wraps a substitute, not the real optimizer | test_worlds: gradients_that_horovod_cannot_take |
| Horovod sums micro-steps instead of averaging | the loss is divided | test_worlds: weights_after_20_steps[groups_of_2_accumulated] |
| hvd.SyncBatchNorm needs GPUs and the whole world | our own batch norm | test_worlds: weights_after_20_steps[groups_of_4], test_batch_norm |
| clipping and loss scale before the reduction | the order in Trainer | test_worlds: loss_scale_clipping_and_accumulation; test_step: the_loss_scale_is_off_before_the_clipping |
| the stall inspector is silent under Gloo | the control channel, and the monitor's hang detection | test_monitor: ranks_that_never_come_are_named; test_faults: a_stopped_rank_is_named_with_the_stacks_of_all (a hang within a collective) |
| grouped reduction ignores its pre-scaling | pre-scaling in the compressor | below; test_worlds: half_precision_wire ("in fixed groups") |
| Horovod fuses tensors by arrival order | fixed groups, never fused | test_worlds: deterministic_mode_repeats (4 ranks) |
| DDP rebuilds its buckets after step 1 | find_unused_parameters in deterministic mode | test_worlds: deterministic_mode_repeats (the resumed run) |
| a rank that exits early shuts down the other ranks | a barrier in close() | test_worlds: a_rank_that_is_done_first |
| each launcher sets other variables | topology | test_topology, and each world by its launcher |

Tested elsewhere: bare `srun` (test_slurm_jobs, on an emulated cluster), and NCCL, which needs GPUs (test_gpu).
"""  # noqa: E501

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.backends.fp16_compression import fp16_share

# Ranks of the published run.
SUMMIT = 1536


def test_every_test_of_the_table_exists() -> None:
    tests = {path.stem: path.read_text() for path in Path(__file__).parents[2].rglob("test_*.py")}
    # One entry is `file: name, name[case], ...`; a word without an underscore is prose.
    named = re.findall(r"(test_\w+): ((?:\w+_\w+(?:\[\w+\])?(?:, )?)+)", __doc__ or "")
    assert len(named) > 10
    for file, names in named:
        for name in re.sub(r"\[\w+\]", "", names).strip(", ").split(", "):
            assert f"def test_{name}" in tests[file] or name in tests, f"{file}: {name}"


def ring_sum(parts_RN: Tensor) -> Tensor:
    """Sum as in a ring of ranks: sequential, rounded to the dtype of the parts after each addition."""
    total_N = torch.zeros_like(parts_RN[0])
    for part_N in parts_RN:
        total_N = total_N + part_N
    return total_N


def tree_sum(parts_RN: Tensor) -> Tensor:
    """Sum as in a tree of ranks: pairwise, rounded after each addition."""
    while len(parts_RN) > 1:
        even_RN, odd_RN = parts_RN[::2], parts_RN[1::2]
        parts_RN = torch.cat([even_RN[: len(odd_RN)] + odd_RN, even_RN[len(odd_RN) :]])
    return parts_RN[0]


@pytest.fixture
def compressor_of() -> Any:
    """Class of the gradient compressor, which takes the world size."""
    try:
        from distributed.backends.horovod import GradientCompressor
    except ImportError as error:
        pytest.skip(f"Horovod is not built here (make horovod): {error}")
    return GradientCompressor


def test_a_sum_of_1536_fp16_gradients_overflows_unless_they_are_divided_first(compressor_of: Any) -> None:
    compressor = compressor_of(SUMMIT, fp16=True)
    for gradient in (60.0, 60000.0):
        gradients_RN = torch.full((SUMMIT, 3), gradient)
        assert ring_sum(gradients_RN.half()).isinf().all()
        sent_RN = torch.stack([compressor.compress(gradient_N)[0] for gradient_N in gradients_RN])
        assert sent_RN.dtype == torch.float16
        context = (torch.float32, False)
        mean_N = compressor.decompress(tree_sum(sent_RN), context)
        torch.testing.assert_close(mean_N, torch.full((3,), gradient), rtol=1e-3, atol=0)
        # A ring adds small parts to a growing sum. With equal parts the rounding error is largest.
        torch.testing.assert_close(
            compressor.decompress(ring_sum(sent_RN), context), torch.full((3,), gradient), rtol=0.2, atol=0
        )


def test_noisy_gradients_lose_little_to_a_half_precision_ring() -> None:
    """The rounding error is far below realistic gradient noise at these batch sizes."""
    gradients_RN = 1e-2 * torch.randn(SUMMIT, 1000, generator=torch.Generator().manual_seed(0)) + 1e-3
    # Loss scale of fp16 training.
    scale = 65536.0
    mean_N = (
        ring_sum(torch.stack([fp16_share(gradient_N * scale, SUMMIT) for gradient_N in gradients_RN])).float() / scale
    )
    exact_N = gradients_RN.double().mean(0).float()
    assert (mean_N - exact_N).norm() / exact_N.norm() < 0.02


def test_the_division_comes_before_the_rounding() -> None:
    """Divide before the cast: fp16 can hold the mean although it cannot hold the gradient of one rank."""
    assert fp16_share(torch.tensor([1e7]), SUMMIT).item() == pytest.approx(1e7 / SUMMIT, rel=1e-3)
    # The mean itself overflows fp16: the step is skipped.
    assert fp16_share(torch.tensor([1e9]), SUMMIT).isinf().all()


def test_small_gradients_need_the_loss_scale_on_a_half_precision_wire() -> None:
    """An ordinary gradient of 1e-5, divided by a large world size, underflows in fp16 without a loss scale."""
    assert fp16_share(torch.tensor([1e-5]), SUMMIT).item() == 0
    scaled = fp16_share(torch.tensor([1e-5 * 65536]), SUMMIT).float() * SUMMIT / 65536
    assert scaled.item() == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_what_is_sent_is_contiguous_and_comes_back_as_it_was(
    layout: str, dtype: torch.dtype, fp16: bool, compressor_of: Any
) -> None:
    gradient = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).to(dtype)
    if layout == "channels_last":
        gradient = gradient.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        gradient = gradient.transpose(0, 1)
    expected, stride = gradient.clone() / 4, gradient.stride()
    compressor = compressor_of(4, fp16)
    sent, context = compressor.compress(gradient)
    assert sent.is_contiguous()
    assert sent.dtype == (torch.float16 if fp16 else torch.float32)
    received = compressor.decompress(sent, context)
    assert received.dtype == dtype
    assert layout == "transposed" or received.stride() == stride
    torch.testing.assert_close(received, expected)

"""Horovod's and DDP's traps: where each one has its test, and those that need no second process.

Worlds are the processes of test_worlds.py, over Gloo and MPI. Seen to fail with the remedy taken out: channels_last, bf16,
micro-steps, loss scale, pre-scaling, DDP's buckets, early exit. Fusion by arrival is not among them: without fixed groups 4 ranks on
one machine repeated themselves all the same, as they happened to arrive alike, so that test proves the remedy harmless and no more.

| trap | remedy | test |
|---|---|---|
| channels_last gradients are refused | a contiguous view in the compressor | below; test_worlds: gradients_that_horovod_cannot_take, weights_after_20_steps[whole_world] |
| bf16 is not reduced | fp32 on the wire | below; test_worlds: gradients_that_horovod_cannot_take |
| zero_grad(set_to_none=True) is refused | the loop has the plain optimizer | test_worlds: gradients_that_horovod_cannot_take, and every training run |
| an optimizer class is made again from `params` alone | the wrapped one is never the real one | test_worlds: gradients_that_horovod_cannot_take |
| micro-steps are summed, not averaged | the loss is divided | test_worlds: weights_after_20_steps[groups_of_2_accumulated] |
| hvd.SyncBatchNorm: GPUs and the whole world alone | batch norm of our own | test_worlds: weights_after_20_steps[groups_of_4], test_batch_norm |
| clipping and loss scale in front of the reduction | the order in Trainer | test_worlds: loss_scale_clipping_and_accumulation; test_step: the_loss_scale_is_off_before_the_clipping |
| the stall inspector is silent under Gloo | the control channel, and the monitor's hang detection | test_monitor: ranks_that_never_come_are_named; test_faults: a_stopped_rank_is_named_with_the_stacks_of_all (a hang within a collective) |
| grouped reduction ignores its pre-scaling | pre-scaling in the compressor | below; test_worlds: half_precision_wire ("in fixed groups") |
| fusion by arrival order | fixed groups, never fused | test_worlds: deterministic_mode_repeats (4 ranks) |
| DDP lays buckets out anew after step 1 | find_unused_parameters in that mode | test_worlds: deterministic_mode_repeats (the resumed run) |
| a rank that ends early takes the others down | a barrier in close() | test_worlds: a_rank_that_is_done_first |
| each launcher sets other variables | topology | test_topology, and each world by its launcher |

Not here: bare `srun` (test_slurm_jobs, on an emulated cluster), and NCCL, which needs GPUs (test_gpu).
"""  # noqa: E501

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.backends.fp16_compression import fp16_share

SUMMIT = 1536  # ranks of the published run


def test_every_test_of_the_table_exists() -> None:
    tests = {path.stem: path.read_text() for path in Path(__file__).parent.rglob("test_*.py")}
    # One entry is `file: name, name[case], ...`; a word without an underscore is prose.
    named = re.findall(r"(test_\w+): ((?:\w+_\w+(?:\[\w+\])?(?:, )?)+)", __doc__ or "")
    assert len(named) > 10
    for file, names in named:
        for name in re.sub(r"\[\w+\]", "", names).strip(", ").split(", "):
            assert f"def test_{name}" in tests[file] or name in tests, f"{file}: {name}"


def ring_sum(parts_RN: Tensor) -> Tensor:
    """The sum as a ring of ranks makes it: one after the other, rounded to the type of the parts each time."""
    total_N = torch.zeros_like(parts_RN[0])
    for part_N in parts_RN:
        total_N = total_N + part_N
    return total_N


def tree_sum(parts_RN: Tensor) -> Tensor:
    """The sum as a tree of ranks makes it: in pairs, and pairs of pairs."""
    while len(parts_RN) > 1:
        even_RN, odd_RN = parts_RN[::2], parts_RN[1::2]
        parts_RN = torch.cat([even_RN[: len(odd_RN)] + odd_RN, even_RN[len(odd_RN) :]])
    return parts_RN[0]


@pytest.fixture
def compressor_of() -> Any:
    """Makes the compressor for a world of any size."""
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
        # A ring adds ever smaller parts to a growing sum, and equal ones lose the most to rounding.
        torch.testing.assert_close(
            compressor.decompress(ring_sum(sent_RN), context), torch.full((3,), gradient), rtol=0.2, atol=0
        )


def test_noisy_gradients_lose_little_to_a_half_precision_ring() -> None:
    """Noise as large as it is at such batches: the rounding is far below it."""
    gradients_RN = 1e-2 * torch.randn(SUMMIT, 1000, generator=torch.Generator().manual_seed(0)) + 1e-3
    scale = 65536.0  # of the loss, which fp16 arithmetic has
    mean_N = (
        ring_sum(torch.stack([fp16_share(gradient_N * scale, SUMMIT) for gradient_N in gradients_RN])).float() / scale
    )
    exact_N = gradients_RN.double().mean(0).float()
    assert (mean_N - exact_N).norm() / exact_N.norm() < 0.02


def test_the_division_comes_before_the_rounding() -> None:
    """A local gradient that fp16 cannot hold has a part of the mean that it can."""
    assert fp16_share(torch.tensor([1e7]), SUMMIT).item() == pytest.approx(1e7 / SUMMIT, rel=1e-3)
    assert fp16_share(torch.tensor([1e9]), SUMMIT).isinf().all()  # the mean itself is too large: a bad step


def test_small_gradients_need_the_loss_scale_on_a_half_precision_wire() -> None:
    """Documents the other end of fp16 in a large world: 1e-5 is an ordinary gradient."""
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

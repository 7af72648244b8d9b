"""The advice on a GPU whose memory is exhausted: the named micro-batch is allowed, smaller, and the next one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.config.schema import BatchConfig
from training.errors import ConfigError
from training.out_of_memory import is_out_of_memory, micro_batch_advice, out_of_memory_message
from training.recipe import make_execution, micro_batches

TORCH = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 12.00 MiB is free. "
    "Including non-PyTorch memory, this process has 9.00 GiB memory in use. Of the allocated memory 70.00 GiB is allocated"
)


def message(phase: str, micro_batch: str | None = None, evaluation_batch: int = 16, world: int = 2) -> str:
    error = torch.OutOfMemoryError(TORCH)
    batch = BatchConfig(global_batch=32, bn_group=4, micro_batch=micro_batch)
    return out_of_memory_message(error, batch, evaluation_batch, world, phase)


def test_the_message_has_the_cause_the_batch_and_the_fix() -> None:
    assert message("step") == (
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 12.00 MiB is free "
        "(in a micro-batch of 16 clips). Fix: batch.micro_batch=8, same result"
    )
    assert message("first step", micro_batch="8").endswith(
        "(in a micro-batch of 8 clips). Fix: batch.micro_batch=4, same result"
    )
    assert message("evaluation").endswith("16 views at once). Fix: evaluation.batch=8, same scores")
    assert "evaluation.batch" not in message("evaluation", evaluation_batch=1)


@given(
    batch=st.integers(1, 96), group=st.integers(1, 96), world=st.integers(1, 24), limit=st.none() | st.integers(1, 96)
)
def test_the_advice_is_the_next_smaller_layout(batch: int, group: int, world: int, limit: int | None) -> None:
    try:
        present = make_execution(batch, group, world, limit).micro_batch
    except ConfigError:
        return
    advice = micro_batch_advice(BatchConfig(global_batch=batch, bn_group=group), world, present)
    if not advice.startswith("batch.micro_batch="):
        assert min(micro_batches(batch, group, world)) == present
        return
    advised = int(advice.split("=")[1].split(",")[0])
    followed = make_execution(batch, group, world, advised)
    assert followed.micro_batch == advised < present
    assert not [size for size in micro_batches(batch, group, world) if advised < size < present]


def test_where_no_smaller_micro_batch_fits_more_processes_are_advised() -> None:
    advice = micro_batch_advice(BatchConfig(global_batch=32, bn_group=32), 1, 32)
    assert advice == "2 processes: batch norm groups of 32 clips allow no smaller micro-batch on 1"
    assert "GPU with more memory" in micro_batch_advice(BatchConfig(global_batch=2, bn_group=1), 2, 1)


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError(TORCH), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_the_errors_that_say_so(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) is is_it

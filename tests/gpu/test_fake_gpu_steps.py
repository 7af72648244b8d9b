"""Training steps on the fake GPU (tests/fake_gpu): no configuration fails or synchronizes, and API calls are bounded."""

from typing import Any

import pytest
import torch

from tests.fake_gpu.counters import WAITS, calls, counted
from tests.helpers.trainers import batches_of, trainer_of
from training.optim.ema import EMA
from training.step import Trainer

pytestmark = pytest.mark.fake_gpu

OPTIMIZERS = ("sgd", "nesterov", "lars", "lamb")
PRECISIONS = ("off", "bfloat16", "float16")
BATCH_NORMS: dict[str, dict[str, Any]] = {
    "whole batch": {},
    "two ghosts": {"bn_group": 2},
    "over ranks": {"over_ranks": True},
    "accumulation": {"micro_batch": 2},
    "accumulation over ranks": {"micro_batch": 2, "over_ranks": True},
}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet50": {"backbone": "resnet50"},
    "mobilenet_v2": {"backbone": "mobilenet_v2"},
    "block shift": {"network_options": {"shift": "block"}},
    "no shift": {"network_options": {"shift": "none"}},
    "past": {"network_options": {"direction": "past"}},
    "partial_bn": {"network_options": {"partial_bn": True}},
    "temporal_pool": {"network_options": {"temporal_pool": True}},
    "non_local": {"backbone": "resnet50", "network_options": {"non_local": True}},
    "zero_init_gamma": {"network_options": {"zero_init_gamma": True}},
}


def take_steps(trainer: Trainer, size: int = 32) -> dict[str, int]:
    """Take two warm-up steps; return the CUDA calls of a third one, in which a synchronization is an error.

    Clips are in pinned memory, as loaders deliver them.
    """
    batches = [[batch.pin_memory() for batch in batches_of(trainer, step, size=size)] for step in range(3)]
    for step in range(2):
        trainer.step(step, batches[step])
    try:
        torch.cuda.set_sync_debug_mode("error")
        with counted() as found:
            trainer.step(2, batches[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return found


def assert_no_wait(found: dict[str, int]) -> None:
    assert {name: found[name] for name in WAITS} == dict.fromkeys(WAITS, 0)
    assert found["copies_to_host"] == 0


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("amp", PRECISIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_or_precision_waits(name: str, amp: str, channels_last: bool) -> None:
    found = take_steps(trainer_of(name, device="cuda", amp=amp, channels_last=channels_last, clip_norm=1.0))
    assert_no_wait(found)
    assert found["kernels"] > 100


@pytest.mark.parametrize("amp", PRECISIONS)
@pytest.mark.parametrize("grouping", BATCH_NORMS)
def test_no_grouping_of_batch_norm_waits(grouping: str, amp: str) -> None:
    assert_no_wait(take_steps(trainer_of(device="cuda", amp=amp, channels_last=True, **BATCH_NORMS[grouping])))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("title", NETWORKS)
def test_no_network_waits(title: str, channels_last: bool) -> None:
    trainer = trainer_of(device="cuda", amp="float16", channels_last=channels_last, **NETWORKS[title])
    assert_no_wait(take_steps(trainer))


def test_averaged_weights_wait_for_nothing() -> None:
    trainer = trainer_of(device="cuda")
    trainer.ema = EMA(trainer.network, 0.9)
    assert_no_wait(take_steps(trainer))


# Upper bounds of the host's CUDA calls per step of the recipe's network. Lower a bound when a change needs fewer calls.
# Fewer calls cost less host time, which limits a step of 8 clips on a fast GPU (docs/gpu.md).
CALLS: dict[str, tuple[int, dict[str, Any]]] = {
    "recipe": (661, {}),
    "no shift": (629, {"network_options": {"shift": "none"}}),
    "batch norm over ranks": (928, {"over_ranks": True}),
    "two ghosts": (1244, {"bn_group": 1}),
    "lars": (763, {"name": "lars"}),
}


@pytest.mark.parametrize("title", CALLS)
def test_a_step_of_the_recipe_makes_no_more_calls_than_recorded(title: str) -> None:
    bound, changes = CALLS[title]
    options: dict[str, Any] = {"micro_batch": 2, "clips": 2, "frames": 8, "backbone": "resnet50", "device": "cuda"}
    trainer = trainer_of(**options | changes, amp="float16", channels_last=True)
    found = calls(take_steps(trainer))
    print(f"{title}: {found} calls")
    assert bound * 0.9 < found <= bound

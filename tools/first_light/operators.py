"""Single operators: the shift against a copy of the same size, and the step of each optimizer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tsm.shift import temporal_shift

from .report import Results
from .shifts import without_triton
from .steps import Way, build
from .timing import device_seconds, free_memory, time_steps

PLACES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
"""Channels and side of the largest shifted input in each stage of a ResNet-50 at 224 pixels."""
OPTIMIZERS = ("sgd", "lars", "lamb")


def operators(results: Results) -> None:
    """Measure the optimizers, and on GPUs the shifts."""
    settings = results.settings
    for title, name in results.each({f"optimizer {name}": name for name in OPTIMIZERS}):
        with results.row(title) as row:
            trainer, _ = build(Way(optimizer=name, amp="off"), settings.shape, settings.device)
            for parameter in trainer.network.parameters():
                parameter.grad = torch.randn_like(parameter)
            for group in trainer.optimizer.param_groups:
                group["lr"] = 1e-3
            row |= time_steps(trainer.optimizer.step, 1, settings.device, settings.tiny)
            del row["clips_s"]
        free_memory(settings.device)
    if settings.device == "cuda":
        places = {f"shift of {channels} x {side} x {side}": (channels, side) for channels, side in PLACES}
        for title, (channels, side) in results.each(dict(list(places.items())[-1:]) if settings.tiny else places):
            with results.row(title) as row:
                row |= shift_rates(channels, side, 2 if settings.tiny else 50)


def shift_rates(channels: int, side: int, repeats: int) -> dict[str, Any]:
    """Measure TB/s of the shift and of a copy (each byte read and written once), and compare both shifts for equal bits."""
    x_BCHW = torch.randn(64, channels, side, side, device="cuda", dtype=torch.bfloat16)
    x_NTCHW = x_BCHW.contiguous(memory_format=torch.channels_last).unflatten(0, (8, 8))
    out_NTCHW = torch.empty_like(x_NTCHW)
    rates = {
        "copy_tb_s": rate_tb_s(partial(out_NTCHW.copy_, x_NTCHW), x_NTCHW, repeats),
        "shift_tb_s": rate_tb_s(partial(temporal_shift, x_NTCHW), x_NTCHW, repeats),
    }
    shifted_NTCHW = temporal_shift(x_NTCHW)
    with without_triton():
        rates["shift_without_triton_tb_s"] = rate_tb_s(partial(temporal_shift, x_NTCHW), x_NTCHW, repeats)
        return {**rates, "bit_equal": shifted_NTCHW.equal(temporal_shift(x_NTCHW))}


def rate_tb_s(function: Callable[[], Any], x_NTCHW: Tensor, repeats: int) -> float:
    return 2 * x_NTCHW.nbytes / device_seconds(function, repeats) / 1e12

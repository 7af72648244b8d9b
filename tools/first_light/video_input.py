"""Throughput of the loaders on 10 s clips of H.264: DALI on the device (NVDEC), and the host's worker processes."""

import os
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch

from pipelines.loading.clips import ClipBatch, ClipSource, TrainingClips
from pipelines.loading.dali_graph import DaliError, import_dali
from pipelines.loading.dali_loader import DaliLoader
from pipelines.loading.worker_loader import ClipLoader
from pipelines.stream.augmentation import Augmentation

from .jobs import make_data
from .report import Results
from .settings import Settings

BATCH = 8
MEASURED_S = 8.0
PREFETCH = 2
DALI_THREADS = 4
"""As many host threads as DALI gets in the launch scripts for each GPU."""


def video_input(results: Results) -> None:
    """Measure clips/s of each loader, alone on the machine."""
    settings = results.settings
    sizes = ("--size", "64", "--frames", "24") if settings.tiny else ("--size", "256", "--frames", "300")
    make_data(results, "input", *sizes, "--train-clips", "60", "--val-clips", "10", "--workers", str(os.cpu_count()))
    loaders: dict[str, Callable[[Settings], DaliLoader | ClipLoader]]
    loaders = {"DALI on the device": dali, "worker processes of the host": host}
    for title, make in results.each(loaders):
        with results.row(title) as row:
            try:
                loader = make(settings)
            except DaliError as error:
                row["skipped"] = str(error)
                continue
            row |= rate(loader.batches(positions()), 0.2 if settings.tiny else MEASURED_S, settings.device)


def dali(settings: Settings) -> DaliLoader:
    """Return the loader of pipeline=dali. Raises DaliError where there is none."""
    if settings.mode == "fake":
        raise DaliError("the fake GPU decodes no video")
    import_dali()
    return DaliLoader(dataset(settings), 2, PREFETCH, torch.device(settings.device), DALI_THREADS)


def host(settings: Settings) -> ClipLoader:
    """Return the loader of pipeline=torch, with a worker process for each core but two."""
    return ClipLoader(dataset(settings), max(1, (os.cpu_count() or 1) - 2), PREFETCH)


def dataset(settings: Settings) -> TrainingClips:
    size = settings.shape.size
    source = ClipSource(settings.work / "input" / "train.arrow", "pyav")
    return TrainingClips(source, Augmentation(num_frames=settings.shape.frames, size=size, flip="on"), 0)


def positions() -> Iterator[Any]:
    """Yield batch indices without end."""
    return (np.arange(number * BATCH, (number + 1) * BATCH) for number in count())


def rate(batches: Iterator[ClipBatch], seconds: float, device: str) -> dict[str, float]:
    """Return clips/s after the batches that were prefetched at the start, and the time until the first batch."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    asked_s = time.monotonic()
    next(batches)
    first_s = time.monotonic() - asked_s
    for _ in range(2 * PREFETCH):
        next(batches)
    synchronize()
    started_s, clips = time.monotonic(), 0
    while time.monotonic() - started_s < seconds:
        clips += len(next(batches).label_N)
    synchronize()
    return {"clips_s": clips / (time.monotonic() - started_s), "first_batch_s": first_s}

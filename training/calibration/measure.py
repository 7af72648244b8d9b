"""Measure steps, all-reduces, decoding, reading and writing on this machine."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from distributed.backends.base import Backend
from distributed.backends.single import SingleBackend
from distributed.topology import Topology
from pipelines.decoding.clip_bytes import encoded_video, image_bytes, read_video
from pipelines.jpeg_clips import IMAGES_PER_FRAME
from pipelines.loading.clips import ClipBatch, TrainingClips
from pipelines.manifest import Manifest, ManifestRow
from runtime.atomic_write import atomic_write
from training.build.recipe import recipe_of
from training.config.schema import Config
from training.job import build_trainer
from training.out_of_memory import is_out_of_memory
from training.planning.checks import sample_rows
from training.recipe import make_execution
from training.step import Trainer

CLIPS = (1, 2, 4, 8, 16, 32, 64)
"""Micro-batches whose steps are measured, until the memory or the time ends."""
STEPS_S, MESSAGES_S = 60.0, 30.0
"""Time for all steps, and for all all-reduces."""
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 30
MESSAGE_BYTES = tuple(32 * 2**10 * 4**power for power in range(7))
"""32 KiB to 128 MiB."""
_LONGEST_MESSAGE_S = 4.0
_DECODING_S, _READING_S = 8.0, 4.0
_READERS = 8
_READ_BYTES, _WRITTEN_BYTES = 256 * 2**20, 64 * 2**20
# A recipe needs a length; the learning rate of a warm-up over it keeps the weights finite.
_ROWS = 10_000_000


class Stepper:
    """Takes steps of one rank on clips in memory, as train.py does, without any reduction over ranks."""

    def __init__(self, config: Config, device: torch.device, clips: int) -> None:
        config = deepcopy(config)
        config.batch.global_batch, config.batch.micro_batch = clips, None
        config.batch.bn_group = gcd(clips, config.batch.bn_clips)
        recipe = recipe_of(config, _ROWS, "")
        alone = SingleBackend(Topology("none", 0, 1, 0, 1, 0, "localhost"), device)
        execution = make_execution(clips, config.batch.bn_clips, 1)
        classes = [str(label) for label in range(config.data.num_classes)]
        self._trainer: Trainer = build_trainer(config, alone, recipe, execution, None, None, classes)[0]
        self._device = device
        self._taken = 0
        network, size = self._trainer.network, config.pipeline.size
        frames = config.model.num_frames + (self._trainer.stream.burn_in if self._trainer.stream else 0)
        shape = (clips, frames, network.in_channels, size, size)
        generator = torch.Generator().manual_seed(config.seed)
        batch = ClipBatch(
            video_NTCHW=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            label_N=torch.zeros(clips, dtype=torch.int64),
            row_N=torch.arange(clips),
            real_N=torch.ones(clips, dtype=torch.bool),
            burn_in_label_N=torch.zeros(clips, dtype=torch.int64) if self._trainer.stream else None,
        )
        self._batch = batch.pin_memory() if device.type == "cuda" else batch

    @property
    def tensors(self) -> int:
        """Number of trained tensors."""
        return sum(parameter.requires_grad for parameter in self._trainer.network.parameters())

    def steps_s(self, count: int) -> list[float]:
        """Take steps and return the seconds of each. The host does not wait for a GPU between them."""
        marks: list[torch.cuda.Event] = []
        times_s = [time.perf_counter()]
        for _ in range(count + 1 if self._device.type == "cuda" else count):
            self._trainer.step(self._taken, [self._batch])
            self._taken += 1
            if self._device.type == "cuda":
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                times_s.append(time.perf_counter())
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [start.elapsed_time(end) / 1000 for start, end in pairwise(marks)]
        return [end - start for start, end in pairwise(times_s)]

    def first_step_s(self) -> float:
        start = time.perf_counter()
        self._trainer.step(self._taken, [self._batch])
        self._taken += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start


@dataclass
class StepTimes:
    """Seconds of steps by their clips, of all ranks together; of the first step, rank 0's."""

    by_clips: dict[int, list[float]] = field(default_factory=dict)
    first_step_s: float = 0.0
    tensors: int = 0
    ended_by: str = ""
    """Why larger micro-batches were not measured; empty if all were."""


def measure_steps(config: Config, backend: Backend) -> StepTimes:
    """Measure steps at each of CLIPS, on all ranks at the same time. Collective.

    Sizes take turns, so that all see the same state of the machine.
    """
    found, steppers = StepTimes(), dict[int, Stepper]()
    began = time.perf_counter()
    for clips in CLIPS:
        if len(steppers) > 1 and not _has_time(backend, found, clips, STEPS_S - (time.perf_counter() - began)):
            found.ended_by = f"{clips} clips take too long"
            break
        stepper = _try_stepper(config, backend, clips, found)
        if not all(backend.all_gather_objects(stepper is not None)) or stepper is None:
            found.ended_by = f"{clips} clips do not fit into the memory"
            break
        steppers[clips] = stepper
        found.by_clips[clips] = []
        _take_turn(backend, stepper, found.by_clips[clips])
    for turn in range(_MOST_ROUNDS):
        over = turn >= _LEAST_ROUNDS and time.perf_counter() - began > STEPS_S
        # Rank 0's clock decides for all.
        if backend.broadcast_object(over):
            break
        for clips, stepper in steppers.items():
            _take_turn(backend, stepper, found.by_clips[clips])
    return found


def _has_time(backend: Backend, found: StepTimes, clips: int, left_s: float) -> bool:
    """Return whether the rest of the time is enough for the least rounds at all sizes up to `clips`."""
    largest = max(found.by_clips)
    step_s = max(found.by_clips[largest]) * clips / largest
    return bool(backend.broadcast_object(2 * step_s * (_LEAST_ROUNDS + 2) < left_s))


def _try_stepper(config: Config, backend: Backend, clips: int, found: StepTimes) -> Stepper | None:
    """Return a stepper that has taken its first steps; None if it does not fit into the memory."""
    try:
        stepper = Stepper(config, backend.device, clips)
        first_s = stepper.first_step_s()
        stepper.first_step_s()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        return None
    if not found.by_clips:
        found.first_step_s, found.tensors = first_s, stepper.tensors
    return stepper


def _take_turn(backend: Backend, stepper: Stepper, times_s: list[float]) -> None:
    # Ranks that share a node compute at the same time, as in training.
    backend.all_gather_objects(None)
    taken = stepper.steps_s(1 if backend.device.type == "cpu" else 4)
    for of_rank in backend.all_gather_objects(taken):
        times_s += of_rank


def measure_messages(backend: Backend) -> dict[int, float]:
    """Return the median seconds of an all-reduce by its bytes, by rank 0's clock. Collective."""
    found: dict[int, float] = {}
    began = time.perf_counter()
    for num_bytes in MESSAGE_BYTES:
        expected_s = 4 * found[max(found)] if found else 0.0
        over = expected_s > _LONGEST_MESSAGE_S or time.perf_counter() - began > MESSAGES_S
        if backend.broadcast_object(over):
            break
        x = torch.zeros(num_bytes // 4, device=backend.device)
        once_s = _message_s(backend, x)
        count = backend.broadcast_object(int(np.clip(MESSAGES_S / 10 / once_s, 3, 25)))
        found[num_bytes] = float(np.median([_message_s(backend, x) for _ in range(count)]))
    return found


def _message_s(backend: Backend, x: Tensor) -> float:
    backend.all_gather_objects(None)
    _wait(backend)
    start = time.perf_counter()
    backend.all_reduce_(x, "calibrate")
    _wait(backend)
    return time.perf_counter() - start


def _wait(backend: Backend) -> None:
    if backend.device.type == "cuda":
        torch.cuda.synchronize(backend.device)


def measure_decoding(clips: TrainingClips) -> tuple[float, int]:
    """Return core seconds per clip, and the number of clips."""
    spent_s, count = 0.0, 0
    clips[np.arange(1)]
    while spent_s < _DECODING_S and count < min(64, len(clips.source.manifest)):
        start = time.process_time()
        clips[np.arange(count, count + 1)]
        spent_s += time.process_time() - start
        count += 1
    return spent_s / count, count


def measure_reading(manifest: Manifest) -> tuple[float, int]:
    """Return GB/s of several threads, and the bytes that they read, past the page cache where the system allows it."""
    count = int(min(len(manifest), _READ_BYTES // fmean(row.length for row in sample_rows(manifest)) + 1))
    began = time.perf_counter()

    def read(number: int) -> int:
        late = time.perf_counter() - began > _READING_S
        return 0 if late else _read_clip(manifest, manifest.row(number))

    with ThreadPoolExecutor(_READERS) as readers:
        taken = sum(readers.map(read, range(count)))
    return taken / (time.perf_counter() - began) / 1e9, taken


def _read_clip(manifest: Manifest, row: ManifestRow) -> int:
    """Read a clip, and return its size."""
    _forget(manifest.root / row.path)
    if row.codec in IMAGES_PER_FRAME:
        return sum(len(image_bytes(manifest.root, row, image)[1]) for image in range(row.num_images))
    return len(read_video(encoded_video(manifest.root, row), row))


def _forget(path: Path) -> None:
    """Ask the kernel to drop a file from its page cache."""
    if path.is_file():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_writing(folder: Path) -> float:
    """Return GB/s of a durable write by one process."""
    folder.mkdir(parents=True, exist_ok=True)
    path, content = folder / "calibrate.bin", os.urandom(_WRITTEN_BYTES)
    start = time.perf_counter()
    try:
        with atomic_write(path) as file:
            file.write(content)
        return len(content) / (time.perf_counter() - start) / 1e9
    finally:
        path.unlink(missing_ok=True)

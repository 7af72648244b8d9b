"""Compare what the loader's workers need with what the machine has."""

from dataclasses import replace

import pytest

from distributed.topology import Topology
from runtime.environment import EnvironmentFault
from training import environment
from training.config.schema import BatchConfig, Config, EvaluationConfig, ModelConfig, PipelineConfig

MIB = 1 << 20
CONFIG = Config(
    model=ModelConfig(num_frames=8),
    pipeline=PipelineConfig(workers=3, prefetch=2, size=224),
    batch=BatchConfig(global_batch=32, bn_group=8, micro_batch="4"),
    evaluation=EvaluationConfig(batch=16),
)
CLIP_BYTES = 8 * 3 * 224 * 224
FOUR_RANKS = Topology("torchrun", 0, 4, 0, 4, 0, "n1")


def notes_with(monkeypatch: pytest.MonkeyPatch, total: int, free: int, config: Config = CONFIG) -> list[str]:
    monkeypatch.setattr(environment, "shared_memory_bytes", lambda: (total, free))
    monkeypatch.setattr(environment, "allow_open_files", lambda *_: None)
    return environment._check_loader(config, FOUR_RANKS)


def test_bytes_of_a_ranks_batches() -> None:
    """Count the prefetched batches of training and evaluation, and two in use."""
    assert environment.loader_bytes(CONFIG, 4) == 3 * 2 * (4 + 16) * CLIP_BYTES + 2 * 16 * CLIP_BYTES
    many_views = replace(CONFIG, evaluation=EvaluationConfig(batch=16, clips="dense", crops=3))
    assert environment.loader_bytes(many_views, 4) == 3 * 2 * (4 + 30) * CLIP_BYTES + 2 * 30 * CLIP_BYTES


def test_flow_takes_ten_channels() -> None:
    flow = replace(CONFIG, model=replace(CONFIG.model, modality="flow"))
    assert 3 * environment.loader_bytes(flow, 4) == 10 * environment.loader_bytes(CONFIG, 4)


def test_dali_and_a_batch_that_fits_no_world_count_nothing() -> None:
    assert environment.loader_bytes(replace(CONFIG, pipeline=replace(CONFIG.pipeline, loader="dali")), 4) == 0
    assert environment.loader_bytes(CONFIG, 5) == 0


def test_enough_shared_memory_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 4 * environment.loader_bytes(CONFIG, 4)
    assert notes_with(monkeypatch, 64 << 30, needed) == []
    no_workers = replace(CONFIG, pipeline=replace(CONFIG.pipeline, workers=0))
    assert notes_with(monkeypatch, 0, 0, no_workers) == []


def test_little_shared_memory_is_stated_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count all ranks of the node: Docker's 64 MiB are for all of them."""
    (note,) = notes_with(monkeypatch, 64 * MIB, 63 * MIB)
    needed = 4 * environment.loader_bytes(CONFIG, 4) / MIB
    for words in (
        "/dev/shm has 63.0 MiB of 64.0 MiB free",
        "4 ranks x 3 workers x 2",
        f"{needed:.1f} MiB",
        "--shm-size=2g",
    ):
        assert words in note
    assert "Fix: " in note


def test_no_room_for_semaphores_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 4 * 3 * (8 + 3 * 3) * 4096
    assert len(notes_with(monkeypatch, MIB, needed)) == 1
    with pytest.raises(EnvironmentFault, match=r"shared memory is short: /dev/shm .*Fix: docker --shm-size"):
        notes_with(monkeypatch, MIB, needed - 1)

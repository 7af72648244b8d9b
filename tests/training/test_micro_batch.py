"""batch.micro_batch=auto: the largest allowed micro-batch that fits on every rank, without a trace in the training."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.training.config.test_config import config_of
from training import micro_batch
from training.build.normalise import Normaliser
from training.config.schema import Config
from training.errors import ConfigError

SMALL = "experiment=smoke pipeline.size=32 model.num_frames=2 batch.global_batch=16 batch.bn_group=2".split()


@dataclass
class World:
    """Two ranks with GPUs, of which the other one holds fewer clips."""

    size: int = 2
    others_hold: int = 99
    tried: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))

    @property
    def topology(self) -> "World":
        return self

    def all_gather_objects(self, fits: bool) -> list[bool]:
        return [fits, self.tried <= self.others_hold]


def config(*overrides: str) -> Config:
    return config_of(*SMALL, *overrides)


def found(monkeypatch: pytest.MonkeyPatch, holds: int, world: World, *overrides: str) -> int | None:
    tried = []

    def fits(config: Config, num_classes: int, clips: int, backend: Any) -> bool:
        tried.append(clips)
        world.tried = clips
        return clips <= holds

    monkeypatch.setattr(micro_batch, "fits", fits)
    size = micro_batch.find_micro_batch(config("batch.micro_batch=auto", *overrides), 10, world)  # type: ignore[arg-type]
    assert tried == sorted(tried, reverse=True)
    return size


def test_the_largest_that_fits_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, 99, World()) == 8
    assert found(monkeypatch, 5, World()) == 4
    assert found(monkeypatch, 99, World(others_hold=3)) == 2


def test_where_none_fits_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"not even a micro-batch of 2 clips fits .* Fix: batch.micro_batch=1, same result"
    ):
        found(monkeypatch, 0, World())


def test_batch_norm_groups_over_ranks_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8, 4, 2 and 1 clips for groups of 8 on two ranks: 8 alone has its groups within a rank."""
    assert found(monkeypatch, 8, World(), "batch.bn_group=8") == 8
    with pytest.raises(ConfigError, match="not even a micro-batch of 8 clips"):
        found(monkeypatch, 4, World(), "batch.bn_group=8")


def test_a_number_null_and_a_cpu_try_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "fits", None)
    cpu: Any = World(device=torch.device("cpu"))
    gpu: Any = World()
    assert micro_batch.find_micro_batch(config("batch.micro_batch=auto"), 10, cpu) is None
    assert micro_batch.find_micro_batch(config("batch.micro_batch=4"), 10, gpu) == 4
    assert micro_batch.find_micro_batch(config("batch.micro_batch=null"), 10, gpu) is None


@pytest.mark.parametrize("amp", ["off", "bfloat16"])
def test_a_trial_leaves_the_random_numbers_alone(amp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real trial, on a CPU whose memory holds 2 clips: it answers, and the next random number is as without it."""
    original = Normaliser.__call__

    def normalise(self: Normaliser, video_NTCHW: torch.Tensor) -> torch.Tensor:
        if len(video_NTCHW) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return original(self, video_NTCHW)

    monkeypatch.setattr(Normaliser, "__call__", normalise)
    configured: Any = config(f"numerics.amp={amp}", "optimizer.ema_decay=0.9")
    cpu: Any = World(device=torch.device("cpu"))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert [micro_batch.fits(configured, 10, clips, cpu) for clips in (4, 2, 1)] == [False, True, True]
    assert torch.equal(torch.get_rng_state(), before)


def test_another_error_of_a_trial_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def normalise(self: Normaliser, video_NTCHW: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("cuDNN error")

    monkeypatch.setattr(Normaliser, "__call__", normalise)
    cpu: Any = World(device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="cuDNN error"):
        micro_batch.fits(config(), 10, 2, cpu)


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "atuo", "''"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"batch.micro_batch must be more than 0, auto or null"):
        config(f"batch.micro_batch={value}")


def test_numbers_of_any_writing_are_numbers() -> None:
    assert config("batch.micro_batch=8").batch.micro_batch_limit == 8
    assert config_of("experiment=kinetics_1536").batch.micro_batch_limit == 8

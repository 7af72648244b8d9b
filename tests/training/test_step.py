"""A training step in one process: its order of operations, and the rollback of steps with non-finite gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.backends.single import SingleBackend
from distributed.topology import Topology
from pipelines.stream.augmentation import dropout_seeds
from tests.helpers.trainers import CLASSES, CLIPS, FRAMES, batches_of, trainer_of
from training.optim.gradient_diagnostics import GradientDiagnostics, noise_and_signal
from training.optim.lars import Lars
from training.optim.nonfinite_guard import clip_, gradient_norms
from training.optim.optimizers import step_counts
from training.step import Trainer
from tsm.networks import TemporalNetwork, build_network

pytestmark = pytest.mark.usefixtures("one_thread")


OPTIMIZERS = ["sgd", "nesterov", "lars", "lars flat", "lamb", "lamb on a device"]


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copy all state that a step changes."""
    state = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    for name, parameter in trainer.network.named_parameters():
        for kind, tensor in trainer.optimizer.state[parameter].items():
            state[f"{name}.{kind}"] = tensor.clone()
    for name, count in step_counts(trainer.optimizer).items():
        state[f"{name}.step"] = torch.tensor(count)
    return state


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not left[name].equal(right[name])]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("damage", [math.inf, math.nan, 1e25])
def test_a_bad_step_changes_nothing_and_the_next_goes_on(name: str, damage: float) -> None:
    """Damage of 1e25 makes squares overflow: running variances become infinite while loss and gradients stay finite."""
    trainer, other = trainer_of(name), trainer_of(name)
    for one in (trainer, other):
        assert one.step(0, batches_of(one, 0))[3] == 0
    before = state_of(trainer)
    assert trainer.step(1, batches_of(trainer, 1, damage))[3] == 1
    assert differing(state_of(trainer), before) == []
    for one in (trainer, other):
        assert one.step(2, batches_of(one, 2))[3] == 0
    after = state_of(trainer)
    # The skipped step left no trace.
    assert differing(after, state_of(other)) == []
    assert set(differing(after, before)) >= {"classifier.weight", "backbone.bn1.running_mean", "backbone.bn1.weight"}


def test_overflowing_statistics_alone_would_not_show_in_the_gradient() -> None:
    """The reduced gradient of this batch would look healthy without the factor that the guard puts on the loss."""
    trainer = trainer_of()
    (batch,) = batches_of(trainer, 0, damage=1e25)
    trainer.network.dropout.seed_N = torch.arange(CLIPS)
    nn.functional.cross_entropy(trainer.network(trainer.normalise(batch.video_NTCHW)), batch.label_N).backward()
    assert not trainer.network.get_buffer("backbone.bn1.running_var").isfinite().all()
    assert gradient_norms(trainer.optimizer)[1].isfinite().all()


@pytest.mark.parametrize("micro_step", [0, 1])
def test_any_micro_step_can_spoil_a_step(micro_step: int) -> None:
    trainer = trainer_of(micro_batch=2)
    before = state_of(trainer)
    assert trainer.step(0, batches_of(trainer, 0, math.inf, micro_step))[3] == 1
    assert differing(state_of(trainer), before) == []


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_good_step_is_torchs_own_bit_for_bit(clip_norm: float | None) -> None:
    trainer, plain = trainer_of(clip_norm=clip_norm), trainer_of()
    for step in range(3):
        assert trainer.step(step, batches_of(trainer, step))[3] == 0
        (batch,) = batches_of(plain, step)
        plain.network.dropout.seed_N = torch.from_numpy(dropout_seeds(0, step, plain.execution.slots(0, 0)))
        plain.optimizer.zero_grad()
        nn.functional.cross_entropy(plain.network(plain.normalise(batch.video_NTCHW)), batch.label_N).backward()
        if clip_norm is not None:
            assert nn.utils.clip_grad_norm_(plain.network.parameters(), clip_norm) > clip_norm
        for group in plain.optimizer.param_groups:
            group["lr"] = 0.1
        plain.optimizer.step()
    assert differing(state_of(trainer), state_of(plain)) == []


def test_the_loss_scale_is_off_before_the_clipping() -> None:
    """Clip the unscaled gradients, because the limit would otherwise apply to 1024 times the norm."""
    trainer = trainer_of(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0), clip_norm=0.5)
    assert trainer.step(0, batches_of(trainer, 0))[3] == 0
    assert torch.linalg.vector_norm(gradient_norms(trainer.optimizer)[1]).item() == pytest.approx(0.5, rel=1e-4)


def test_a_scale_that_is_too_large_is_halved_and_nothing_else_changes() -> None:
    trainer = trainer_of(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**126))
    # Gradients become large enough to overflow at that scale.
    trainer.network.classifier.weight.data *= 2.0**12
    before = state_of(trainer)
    steps = 0
    while trainer.step(steps, batches_of(trainer, steps))[3] == 1:
        steps += 1
        assert differing(state_of(trainer), before) == []
        assert trainer.scaler.get_scale() == 2.0 ** (126 - steps)
    assert 1 < steps < 20
    assert "classifier.weight" in differing(state_of(trainer), before)


# float16 is slow on a CPU.
@pytest.mark.slow
def test_half_precision_takes_a_step_and_rolls_one_back() -> None:
    trainer = trainer_of(amp="float16", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    before = state_of(trainer)
    assert trainer.step(0, batches_of(trainer, 0, math.inf))[3] == 1
    assert differing(state_of(trainer), before) == []
    assert trainer.step(1, batches_of(trainer, 1))[3] == 0
    assert "classifier.weight" in differing(state_of(trainer), before)


class _NoWaiting(TorchDispatchMode):
    """Dispatch mode that refuses reads of tensor values on the host, which would synchronize with the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "local_scalar_dense" not in str(func), "a number was read from the device"
        assert "nonzero" not in str(func), "a shape was read from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["sgd", "lars flat"])
def test_no_step_waits_for_the_device(name: str, scaled: bool) -> None:
    trainer = trainer_of(name, scaler=torch.amp.GradScaler("cpu", enabled=scaled), clip_norm=1.0)
    batches = [batches_of(trainer, 0), batches_of(trainer, 1, math.inf)]
    with _NoWaiting():
        results = [trainer.step(step, batch) for step, batch in enumerate(batches)]
        with pytest.raises(AssertionError, match="number"):
            results[0][3].item()


def test_a_norm_that_cannot_be_held_is_bad_too() -> None:
    """Squares of finite gradients can overflow, and an infinite norm cannot be used for clipping."""
    trainer = trainer_of()
    trainer.step(0, batches_of(trainer, 0))
    before = state_of(trainer)
    for parameter in trainer.network.parameters():
        parameter.grad = torch.full_like(parameter, 1e25)
    trainer.guard.begin()
    trainer.guard.checked(torch.zeros(()))
    assert trainer.guard.update(torch.linalg.vector_norm(gradient_norms(trainer.optimizer)[1])) == 1
    assert differing(state_of(trainer), before) == []


def test_clipping_leaves_a_short_gradient_alone_and_shortens_a_long_one() -> None:
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    norm = torch.tensor(5.0)
    clip_(gradients, norm, limit=6.0)
    assert torch.cat(gradients).tolist() == [3.0, 0.0, 4.0]
    clip_(gradients, norm, limit=1.0)
    assert torch.cat(gradients).tolist() == pytest.approx([0.6, 0.0, 0.8], rel=1e-6)


def test_lars_wants_gradients_without_their_scale() -> None:
    network: TemporalNetwork = build_network("resnet18", CLASSES, num_frames=FRAMES)
    optimizer = Lars(network.parameters())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(sum(parameter.sum() for parameter in network.parameters())).backward()  # type: ignore[union-attr, arg-type]
    with pytest.raises(ValueError, match="unscale_"):
        scaler.step(optimizer)


def test_noise_and_signal_are_recovered_from_their_definition() -> None:
    """A gradient over B clips has an expected squared norm of |G|^2 + tr / B."""
    trace, square = 50.0, 4.0
    assert noise_and_signal(square + trace / 8, square + trace / 64, 8, 64) == pytest.approx((trace, square))


def test_a_measured_step_is_the_same_step_and_leaves_nothing_behind() -> None:
    trainer, other = trainer_of("lars", micro_batch=2, clip_norm=0.5), trainer_of("lars", micro_batch=2, clip_norm=0.5)
    backend = SingleBackend(Topology("none", 0, 1, 0, 1, 0, "here"), torch.device("cpu"))
    diagnostics = GradientDiagnostics(trainer.network, trainer.optimizer, backend, trainer.execution)
    for step in range(2):
        trainer.step(step, batches_of(trainer, step), diagnostics)
        other.step(step, batches_of(other, step))
    assert differing(state_of(trainer), state_of(other)) == []
    values = diagnostics.values()
    assert values["gradient_norm"] > 0
    noise, signal = values["gradient_noise"], values["gradient_signal"]
    assert values["noise_scale_clips"] == (pytest.approx(noise / signal) if noise > 0 and signal > 0 else None)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainer.network.parameters())
    trainer.step(2, batches_of(trainer, 2, math.inf), diagnostics)
    assert diagnostics.values() == {}


def test_one_batch_of_one_rank_has_no_noise_scale() -> None:
    trainer = trainer_of()
    backend = SingleBackend(Topology("none", 0, 1, 0, 1, 0, "here"), torch.device("cpu"))
    diagnostics = GradientDiagnostics(trainer.network, trainer.optimizer, backend, trainer.execution)
    trainer.step(0, batches_of(trainer, 0), diagnostics)
    values = diagnostics.values()
    assert "noise_scale_clips" not in values
    assert values["trust_ratios"] == {}
    assert values["gradient_norms"].keys() == dict(trainer.network.named_parameters()).keys()

"""Both implementations of LARS agree with the published rule in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from training.optim.lars import CHUNK, Lars, trust_ratio

ETA, EPS, MOMENTUM, DECAY = 0.001, 1e-8, 0.9, 1e-4
FLAT = pytest.mark.parametrize("flat", [False, True])
# Fewer elements than a row, exactly one row, one element more, several rows; a matrix, a convolution.
SHAPES = [(3,), (CHUNK,), (CHUNK + 1,), (7, 11), (40, 16, 3, 3), (5, 5000)]


def tensors(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(shape, dtype=torch.float64, generator=generator) * 10 ** (i - 3) for i, shape in enumerate(SHAPES)
    ]
    made[4] = made[4].contiguous(memory_format=torch.channels_last)
    return [tensor.to(dtype) for tensor in made]


class Reference:
    """The LARS rule one tensor at a time, with Python doubles for numbers per tensor."""

    def __init__(self, weights: list[Tensor], adapt: bool, decay: float) -> None:
        self.weights = [weight.double().clone() for weight in weights]
        self.velocities = [torch.zeros_like(weight) for weight in self.weights]
        self.adapt, self.decay = adapt, decay

    def step(self, gradients: list[Tensor], rate: float) -> None:
        for weight, velocity, gradient in zip(self.weights, self.velocities, gradients, strict=True):
            trust = self.trust(weight, gradient.double()) if self.adapt else 1.0
            velocity.mul_(MOMENTUM).add_(rate * trust * (gradient.double() + self.decay * weight))
            weight.sub_(velocity)

    def trust(self, weight: Tensor, gradient: Tensor) -> float:
        weight_norm, gradient_norm = (math.sqrt(math.fsum((x * x).flatten().tolist())) for x in (weight, gradient))
        if weight_norm == 0 or gradient_norm == 0:
            return 1.0
        return ETA * weight_norm / (gradient_norm + self.decay * weight_norm + EPS)


def optimizer_of(parameters: list[nn.Parameter], flat: bool, plain: int = 2) -> Lars:
    """LARS whose first `plain` tensors have no adaptation and no decay, and whose others have both."""
    return Lars(
        [
            {"params": parameters[:plain], "adapt": False, "weight_decay": 0.0},
            {"params": parameters[plain:], "adapt": True, "weight_decay": DECAY},
        ],
        momentum=MOMENTUM,
        trust_coefficient=ETA,
        eps=EPS,
        flat=flat,
    )


@FLAT
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_steps_follow_the_rule(flat: bool, dtype: torch.dtype, tolerance: float) -> None:
    parameters = [nn.Parameter(tensor) for tensor in tensors(dtype)]
    expected = [
        Reference([parameter.detach() for parameter in part], adapt, decay)
        for part, adapt, decay in ((parameters[:2], False, 0.0), (parameters[2:], True, DECAY))
    ]
    optimizer = optimizer_of(parameters, flat)
    for step, rate in enumerate((0.5, 1.7, 0.01, 3.0)):
        gradients = tensors(dtype, seed=step + 1)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        expected[0].step(gradients[:2], rate)
        expected[1].step(gradients[2:], rate)
    for parameter, weight in zip(parameters, expected[0].weights + expected[1].weights, strict=True):
        torch.testing.assert_close(
            parameter.detach().double(), weight, rtol=tolerance, atol=tolerance * float(weight.norm())
        )


@FLAT
def test_a_schedule_that_moves_does_not_rescale_old_velocity(flat: bool) -> None:
    """The velocity includes the rate, so it needs no momentum correction: without a gradient the old rate continues."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = Lars([parameter], lr=1.0, momentum=0.5, adapt=False, flat=flat)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.param_groups[0]["lr"] = 100.0
    optimizer.step()
    assert parameter.detach().tolist() == [1.0 - 1.0 - 0.5] * 4


@pytest.mark.parametrize(("weight_norm", "gradient_norm"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_without_a_norm_the_ratio_is_one(weight_norm: float, gradient_norm: float) -> None:
    ratio_P = trust_ratio(torch.tensor([weight_norm]), torch.tensor([gradient_norm]), DECAY, ETA, 0.0)
    assert ratio_P.tolist() == [1.0]


@FLAT
def test_the_ratios_that_are_shown_are_those_that_are_used(flat: bool) -> None:
    parameters = [nn.Parameter(tensor) for tensor in tensors(torch.float64)]
    for parameter, gradient in zip(parameters, tensors(torch.float64, seed=1), strict=True):
        parameter.grad = gradient
    optimizer = optimizer_of(parameters, flat)
    shown = optimizer.trust_ratios()
    assert set(shown) == set(parameters[2:])
    for group in optimizer.param_groups:
        group["lr"] = 2.0
    before = {parameter: parameter.detach().clone() for parameter in parameters[2:]}
    optimizer.step()
    for parameter in parameters[2:]:
        assert parameter.grad is not None
        moved = before[parameter] - parameter.detach()
        expected = 2.0 * shown[parameter] * (parameter.grad + DECAY * before[parameter])
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-15)


def test_flat_parameters_keep_shape_layout_values_and_grad() -> None:
    originals = tensors(torch.float32)
    parameters = [nn.Parameter(tensor.clone(memory_format=torch.preserve_format)) for tensor in originals]
    optimizer = optimizer_of(parameters, flat=True)
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    assert len(storages) == 2, "one buffer for each group"
    for parameter, original in zip(parameters, originals, strict=True):
        assert torch.equal(parameter.detach(), original)
        assert parameter.stride() == original.stride()
        assert optimizer.state[parameter]["momentum_buffer"].shape == original.shape


def test_the_number_of_kernels_does_not_grow_with_the_number_of_tensors() -> None:
    def operators(count: int) -> int:
        parameters = [nn.Parameter(torch.ones(10)) for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.ones(10)
        optimizer = Lars(parameters, lr=0.1, flat=True)
        # Without acc_events, torch 2.11 warns.
        with torch.profiler.profile(acc_events=True) as profile:
            optimizer.step()
        # A foreach operator is a few kernels on a GPU. On a CPU it calls one operator per tensor inside, so count the
        # outer operators.
        outer = [event for event in profile.events() if event.cpu_parent is None or "step" in event.cpu_parent.name]
        return len([event for event in outer if event.name.startswith("aten::")])

    assert operators(3) == operators(300)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\).*1\.0"),
        ({"weight_decay": -1.0}, r"weight_decay 0 or more.*-1\.0"),
        ({"trust_coefficient": 0.0}, "trust_coefficient must be more than 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Lars([nn.Parameter(torch.ones(1))], **options)  # type: ignore[arg-type]

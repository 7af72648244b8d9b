"""Precision and memory format: torch's switches, the placement of the network, and refused settings."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.config.test_config import config_of
from training.build import numerics as module
from training.build.numerics import autocast, check_device, place_network, set_numerics
from training.config.schema import NumericsConfig
from training.errors import ConfigError
from training.planning.memory import step_costs
from training.recipe import make_execution
from tsm.networks import TemporalNetwork, build_network
from tsm.non_local import NonLocalBlock

from .test_step import batches_of, differing, state_of, trainer_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# The module defines its attributes at run time.
FILL: Any = torch.utils.deterministic


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore torch's switches after the test."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fill = FILL.fill_uninitialized_memory
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    FILL.fill_uninitialized_memory = fill
    (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) = tf32


# --- Deterministic mode -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_switches(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    set_numerics(NumericsConfig(deterministic=deterministic), seed=7)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark != deterministic
    assert FILL.fill_uninitialized_memory != deterministic
    assert torch.initial_seed() == 7


@pytest.mark.usefixtures("switches")
def test_the_deterministic_mode_repeats_and_reads_no_uninitialized_memory() -> None:
    """Steps have the same bits when every torch.empty is filled with NaN, so they read no uninitialized memory.

    The fill, one kernel per allocation, is therefore unnecessary.
    """
    set_numerics(NumericsConfig(deterministic=True), seed=0)
    states = []
    for fill in (False, False, True):
        FILL.fill_uninitialized_memory = fill
        trainer = trainer_of("lars")
        for step in range(2):
            assert trainer.step(step, batches_of(trainer, step))[3] == 0
        states.append(state_of(trainer))
    assert differing(states[0], states[1]) == []
    assert differing(states[0], states[2]) == []


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize(
    "variant", [{"temporal_pool": True}, {"non_local": True}], ids=lambda variant: next(iter(variant))
)
def test_pooling_in_deterministic_mode_reads_no_uninitialized_memory(variant: dict[str, Any]) -> None:
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    network = build_network("resnet50", 5, num_frames=4, dropout=0.0, **variant)
    gradients = []
    for fill in (False, True):
        FILL.fill_uninitialized_memory = fill
        network.zero_grad()
        network(torch.ones(2, 4, 3, 32, 32)).square().sum().backward()
        gradients.append({name: one.grad for name, one in network.named_parameters() if one.grad is not None})
    assert differing(*gradients) == []


def gradients_on_gpu(variant: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = build_network("resnet50", 5, num_frames=4, dropout=0.0, **variant)
    place_network(network, GPU, NumericsConfig(channels_last=True))
    with autocast(GPU, "bfloat16"):
        logit_NK = network(torch.randn(2, 4, 3, 64, 64).to(GPU))
    logit_NK.square().sum().backward()
    return {name: one.grad for name, one in network.named_parameters() if one.grad is not None}


VARIANTS = pytest.mark.parametrize(
    "variant", [{}, {"temporal_pool": True}, {"non_local": True}], ids=lambda variant: next(iter(variant), "tsm")
)


@pytest.mark.gpu
@pytest.mark.fake_gpu
@pytest.mark.usefixtures("switches")
@VARIANTS
def test_every_variant_has_a_deterministic_backward_pass_on_gpus(variant: dict[str, Any]) -> None:
    set_numerics(NumericsConfig(deterministic=True), seed=0)
    assert gradients_on_gpu(variant)


@pytest.mark.gpu
@pytest.mark.usefixtures("switches")
@VARIANTS
def test_the_deterministic_mode_repeats_on_gpus(variant: dict[str, Any]) -> None:
    set_numerics(NumericsConfig(deterministic=True), seed=0)
    assert differing(gradients_on_gpu(variant), gradients_on_gpu(variant)) == []


# --- Devices ----------------------------------------------------------------------------------------------------------


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda device: name)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["numerics=gpu"], r"numerics\.amp=bfloat16 needs .* 8\.0 .* V100 has 7\.0\. Fix: numerics=gpu_fp16"),
        (["evaluation.amp=bfloat16"], r"evaluation\.amp=bfloat16 needs .* 8\.0 .* V100 has 7\.0\. Fix: evaluation\.amp=float16"),
    ],
)  # fmt: skip
def test_bfloat16_is_refused_where_it_would_be_emulated(
    overrides: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, "V100", (7, 0))
    config = config_of("experiment=smoke", *overrides)
    with pytest.raises(ConfigError, match=says):
        check_device(config.numerics, config.evaluation, GPU)


@pytest.mark.parametrize(
    ("overrides", "capability"),
    [(["numerics=gpu"], (8, 0)), (["numerics=gpu"], (12, 0)), (["numerics=gpu_fp16"], (7, 5)), ([], (7, 0))],
)
def test_what_a_gpu_can_do_is_taken(
    overrides: list[str], capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, "GPU", capability)
    config = config_of("experiment=smoke", *overrides)
    check_device(config.numerics, config.evaluation, GPU)


def test_cpus_take_any_precision() -> None:
    config = config_of("experiment=smoke", "numerics=gpu", "evaluation.amp=float16")
    check_device(config.numerics, config.evaluation, CPU)


@pytest.mark.parametrize(("amp", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_autocast(amp: str, dtype: torch.dtype) -> None:
    x_NN = torch.ones(2, 2)
    with autocast(CPU, amp):
        assert (x_NN @ x_NN).dtype == dtype
    with autocast(CPU, "off"):
        assert (x_NN @ x_NN).dtype == torch.float32


# --- Placement --------------------------------------------------------------------------------------------------------


def non_local_network() -> TemporalNetwork:
    torch.manual_seed(0)
    network = build_network("resnet50", 5, num_frames=4, non_local=True, dropout=0.0)
    for block in network.modules():
        if isinstance(block, NonLocalBlock):
            nn.init.ones_(block.W[1].weight)  # type: ignore[arg-type]
    return network


def test_placing_a_network() -> None:
    network = non_local_network()
    before = dict(network.named_parameters())
    place_network(network, CPU, NumericsConfig(dtype="float64", channels_last=True))
    for name, parameter in network.named_parameters():
        # The optimizer refers to the same parameters as before.
        assert parameter is before[name]
        assert parameter.dtype == torch.float64
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)
    assert network.backbone.conv1.weight.stride()[1] == 1  # type: ignore[union-attr, operator]
    place_network(network, CPU, NumericsConfig())
    assert network.classifier.weight.dtype == torch.float32


def test_a_non_local_network_in_channels_last_is_the_same_network() -> None:
    """Outputs and gradients agree, and each block passes channels_last to the next layer."""
    contiguous = non_local_network()
    channels_last = copy.deepcopy(contiguous)
    place_network(contiguous, CPU, NumericsConfig(dtype="float64"))
    place_network(channels_last, CPU, NumericsConfig(dtype="float64", channels_last=True))
    kept: list[bool] = []
    for block in channels_last.modules():
        if isinstance(block, NonLocalBlock):
            block.register_forward_hook(
                lambda _, args, out: kept.extend(x.is_contiguous(memory_format=torch.channels_last) for x in (*args, out))
            )  # fmt: skip
    x_NTCHW = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    frames_BCHW = x_NTCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    logits = [contiguous(x_NTCHW), channels_last(frames_BCHW.unflatten(0, (2, 4)))]
    assert kept == [True] * 10
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-9, atol=1e-12)
    for logit_NK in logits:
        logit_NK.square().sum().backward()
    gradients: list[list[Tensor | None]] = [
        [parameter.grad for parameter in network.parameters()] for network in (contiguous, channels_last)
    ]
    scale = max(gradient.abs().max().item() for gradient in gradients[0] if gradient is not None)
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-10 * scale)


def test_a_plan_of_a_non_local_network_in_channels_last() -> None:
    config = config_of("experiment=kinetics_single_node", "model.non_local=true", "pipeline.size=64", "numerics=gpu")
    contiguous = config_of(
        "experiment=kinetics_single_node",
        "model.non_local=true",
        "pipeline.size=64",
        "numerics=gpu",
        "numerics.channels_last=false",
    )
    costs, expected = (
        step_costs(
            one.model,
            one.data.num_classes,
            one.pipeline.size,
            one.numerics,
            one.optimizer,
            make_execution(128, 16, 16),
        )
        for one in (config, contiguous)
    )
    assert costs.weights_bytes == expected.weights_bytes
    assert costs.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.1)

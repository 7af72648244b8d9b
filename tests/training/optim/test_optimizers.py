"""The official parameter groups, and optimizer steps with their factors."""

import copy
import sys

import pytest
import torch
from torch import nn

from distributed.backends.single import SingleBackend
from distributed.batch_norm.layer import convert_batch_norm
from distributed.topology import Topology
from training.config.schema import OptimizerConfig
from training.errors import ConfigError
from training.optim.optimizers import (
    DeviceStepCount,
    describe_optimizer,
    make_optimizer,
    optimizer_tensors,
    parameter_groups,
    set_learning_rate,
    set_step_counts,
    step_counts,
)
from tsm.networks import TemporalNetwork, build_network

OFFICIAL = OptimizerConfig(
    momentum=0.9,
    weight_decay=1e-4,
    bias_lr_multiplier=2.0,
    classifier_lr_multiplier=5.0,
    first_conv_lr_multiplier=5.0,
)


def small_network() -> TemporalNetwork:
    torch.manual_seed(0)
    network = build_network("resnet18", 5, num_frames=2, dropout=0.0)
    convert_batch_norm(network, SingleBackend(Topology("none", 0, 1, 0, 1, 0, "here"), torch.device("cpu")), 1, [], 1)
    return network


def settings_by_name(network: TemporalNetwork, config: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """Map each parameter's name to its (learning-rate multiplier, weight decay)."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {
        names[parameter]: (group["lr_multiplier"], group["weight_decay"])
        for group in parameter_groups(network, config)
        for parameter in group["params"]
    }


def test_every_kind_of_parameter_has_the_official_factors() -> None:
    """The non-local network has biases in its convolutions."""
    with torch.device("meta"):
        network = build_network("resnet50", 5, non_local=True)
    settings = settings_by_name(network, OFFICIAL)
    assert settings["backbone.conv1.weight"] == (1.0, 1e-4)
    assert settings["backbone.layer3.5.conv2.weight"] == (1.0, 1e-4)
    assert settings["backbone.layer2.0.non_local.theta.weight"] == (1.0, 1e-4)
    assert settings["backbone.layer2.0.non_local.theta.bias"] == (2.0, 0.0)
    assert settings["backbone.bn1.weight"] == settings["backbone.bn1.bias"] == (1.0, 0.0)
    assert settings["backbone.layer2.0.non_local.W.1.bias"] == (1.0, 0.0)
    assert settings["classifier.weight"] == (5.0, 1e-4)
    assert settings["classifier.bias"] == (10.0, 0.0)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_a_flow_networks_first_convolution_has_the_official_factors(backbone: str) -> None:
    """5 for the weight and 10 for a bias, which no backbone has there; 1 and 2 for RGB. Partial BN leaves the first BN active."""
    first, norm = ("conv1", "bn1") if backbone == "resnet18" else ("features.0.0", "features.0.1")
    with torch.device("meta"):
        networks = {
            modality: build_network(backbone, 5, partial_bn=True, modality=modality) for modality in ("rgb", "flow")
        }
    for modality, network in networks.items():
        convolution = network.get_submodule(f"backbone.{first}")
        assert isinstance(convolution, nn.Conv2d) and convolution.bias is None
        convolution.bias = nn.Parameter(convolution.weight.new_zeros(convolution.out_channels))
        settings, plain = (settings_by_name(network, config) for config in (OFFICIAL, OptimizerConfig()))
        weight, bias = f"backbone.{first}.weight", f"backbone.{first}.bias"
        assert settings[weight] == (5.0 if modality == "flow" else 1.0, 1e-4)
        assert settings[bias] == (10.0 if modality == "flow" else 2.0, 0.0)
        assert plain[weight] == (1.0, 1e-4) and plain[bias] == (1.0, 0.0)
        assert {name for name in settings if ".bn" in name or ".0.1." in name} == {
            f"backbone.{norm}.weight",
            f"backbone.{norm}.bias",
        }
        second = "backbone.layer1.0.conv1.weight" if backbone == "resnet18" else "backbone.features.1.conv.0.0.weight"
        assert settings[second] == (1.0, 1e-4)


def test_every_trained_parameter_is_in_one_group() -> None:
    network = small_network()
    network.get_parameter("backbone.layer1.0.bn1.weight").requires_grad_(False)
    grouped = [parameter for group in parameter_groups(network, OFFICIAL) for parameter in group["params"]]
    trained = {parameter for parameter in network.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped)) == len(trained)
    assert set(grouped) == trained


def test_a_parameter_without_a_rule_is_an_error() -> None:
    network = small_network()
    network.register_parameter("gate", nn.Parameter(torch.zeros(3)))
    with pytest.raises(TypeError, match="gate in a TemporalNetwork"):
        parameter_groups(network, OFFICIAL)


def test_two_steps_follow_the_rule_by_hand() -> None:
    """v <- m v + (g + wd w); w <- w - rate * factor * v, with the factor of each parameter."""
    network = small_network().double()
    expected = {name: value.clone() for name, value in copy.deepcopy(network.state_dict()).items()}
    velocity = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    settings = settings_by_name(network, OFFICIAL)
    optimizer = make_optimizer(network, OFFICIAL)
    for rate in (0.1, 0.03):
        generator = torch.Generator().manual_seed(int(1000 * rate))
        for name, parameter in network.named_parameters():
            parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            factor, decay = settings[name]
            velocity[name] = 0.9 * velocity[name] + parameter.grad + decay * expected[name]
            expected[name] -= rate * factor * velocity[name]
        set_learning_rate(optimizer, rate)
        optimizer.step()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_the_state_is_there_before_the_first_step_and_by_name() -> None:
    network = small_network()
    state = optimizer_tensors(network, make_optimizer(network, OFFICIAL))
    assert state.keys() == {f"{name}.momentum_buffer" for name, _ in network.named_parameters()}
    assert not any(tensor.any() for tensor in state.values())


def take_steps(network: TemporalNetwork, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate(optimizer, 0.01)
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb"])
def test_a_restored_optimizer_goes_on_bit_for_bit(name: str) -> None:
    config = OptimizerConfig(name=name, momentum=0.9, weight_decay=1e-3)
    straight = small_network()
    take_steps(straight, make_optimizer(straight, config), range(6))

    first = small_network()
    optimizer = make_optimizer(first, config)
    take_steps(first, optimizer, range(3))
    second = small_network()
    restored = make_optimizer(second, config)
    second.load_state_dict(first.state_dict())
    saved = {key: tensor.clone() for key, tensor in optimizer_tensors(first, optimizer).items()}
    for key, tensor in optimizer_tensors(second, restored).items():
        tensor.copy_(saved[key])
    set_step_counts(restored, step_counts(optimizer))
    take_steps(second, restored, range(3, 6))
    for ours, theirs in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_lars_adapts_weights_alone_with_the_official_factors() -> None:
    network = small_network()
    optimizer = make_optimizer(network, OptimizerConfig(**{**vars(OFFICIAL), "name": "lars"}))
    adapted = {group["name"]: (group["adapt"], group["lr_multiplier"]) for group in optimizer.param_groups}
    assert adapted == {
        "backbone.weight": (True, 1.0),
        "batch_norm": (False, 1.0),
        "classifier.weight": (True, 5.0),
        "classifier.bias": (False, 10.0),
    }


@pytest.mark.parametrize("counts_on_device", [False, True])
def test_lamb_is_the_published_rule_where_it_adapts(counts_on_device: bool) -> None:
    """arXiv:1904.00962, algorithm 2: r = m/(sqrt(v)+eps) + wd w; w <- w - lr |w|/|r| r, with bias correction."""
    network = small_network()
    config = OptimizerConfig(name="lamb", momentum=0.9, beta2=0.999, eps=1e-6, weight_decay=0.01)
    optimizer = make_optimizer(network, config)
    if counts_on_device:
        for group in optimizer.param_groups:
            group["step"] = DeviceStepCount(torch.device("cpu"))
    weight = network.get_parameter("backbone.layer1.0.conv1.weight")
    expected = weight.detach().double().clone()
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 4):
        take_steps(network, optimizer, range(step, step + 1))
        assert weight.grad is not None
        g = weight.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        r = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + 0.01 * expected
        expected = expected - 0.01 * expected.norm() / r.norm() * r
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "says"),
    [("sgd", "torch's SGD (fused)"), ("lars", "fused SGD kernel"), ("lamb", "timm's Lamb (not fused)")],
)
def test_the_log_says_what_runs(name: str, says: str) -> None:
    assert says in describe_optimizer(make_optimizer(small_network(), OptimizerConfig(name=name)))


def test_lamb_without_timm_says_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ConfigError, match=r"optimizer\.name=lamb needs the package timm.*Fix: pip install"):
        make_optimizer(small_network(), OptimizerConfig(name="lamb"))

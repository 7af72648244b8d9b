"""The official parameter groups, and the optimizer step that follows from them."""

import copy

import pytest
import torch
from torch import nn

from distributed.backend import SingleBackend
from distributed.batch_norm import convert_batch_norm
from distributed.topology import Topology
from training.optimizers import make_optimizer, optimizer_tensors, parameter_groups, set_learning_rate
from training.schema import OptimizerConfig
from tsm.networks import TemporalNetwork, build_network

OFFICIAL = OptimizerConfig(momentum=0.9, weight_decay=1e-4, bias_lr_multiplier=2.0, classifier_lr_multiplier=5.0)


def small_network() -> TemporalNetwork:
    torch.manual_seed(0)
    network = build_network("resnet18", 5, num_frames=2, dropout=0.0)
    convert_batch_norm(network, SingleBackend(Topology("none", 0, 1, 0, 1, 0, "here"), torch.device("cpu")), 1, [], 1)
    return network


def settings_by_name(network: nn.Module, config: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """(learning-rate multiplier, weight decay) of each parameter."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {
        names[parameter]: (group["lr_multiplier"], group["weight_decay"])
        for group in parameter_groups(network, config)
        for parameter in group["params"]
    }


def test_every_kind_of_parameter_has_the_official_factors() -> None:
    """The non-local network is the one with biases in its convolutions."""
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

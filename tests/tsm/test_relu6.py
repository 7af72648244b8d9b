"""ReLU6 that keeps its output: torch's values and gradients to the bit, and less memory between forward and backward pass."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tsm.networks import build_network
from tsm.relu6 import ReLU6, replace_relu6

pytestmark = pytest.mark.usefixtures("one_thread")


def saved_bytes(network: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Run a forward pass and return the bytes of the storages that autograd keeps for the backward pass, without weights."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(x)
    assert out.requires_grad
    weights = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    return sum(size for pointer, size in storages.items() if pointer not in weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_torchs_to_the_bit(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, 6.0, torch.nan, torch.inf, -torch.inf, 6.01, 5.99, 1e-30, -1e-30]
    x = torch.cat([torch.tensor(special), torch.linspace(-9, 9, 990)]).to(dtype).view(10, 4, 5, 5)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for module in (ReLU6(), nn.ReLU6(inplace=True)):
        leaf = x.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
        out = module(leaf * 1)
        out.backward(grad)
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad))
    (ours, our_grad), (theirs, their_grad) = results
    assert ours.stride() == theirs.stride() and our_grad.stride() == their_grad.stride()
    for one, other in ((ours, theirs), (our_grad, their_grad)):
        assert one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8))


def test_it_works_in_place_with_and_without_gradients() -> None:
    for requires_grad in (False, True):
        x = torch.linspace(-9, 9, 10).requires_grad_(requires_grad) * 1
        assert ReLU6()(x).data_ptr() == x.data_ptr()


def test_gradients_of_first_and_second_order() -> None:
    x = torch.linspace(-8.9, 9, 12, dtype=torch.float64, requires_grad=True)
    # Cubed, because the second derivative of ReLU6 is zero.
    assert torch.autograd.gradcheck(lambda x: ReLU6()(x * 1) ** 3, x)
    assert torch.autograd.gradgradcheck(lambda x: ReLU6()(x * 1) ** 3, x)


def mobilenet(ours: bool) -> nn.Module:
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2(weights=None)
    if ours:
        replace_relu6(network)
    return network.train()


def test_training_keeps_no_copies_of_inputs() -> None:
    x_BCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    ours, theirs = mobilenet(True), mobilenet(False)
    # Each of the 35 copies is as large as the batch norm's input and the next convolution's, which both are kept.
    assert saved_bytes(ours, ours, x_BCHW) < 0.72 * saved_bytes(theirs, theirs, x_BCHW)


# torch 2.11's Dynamo instantiates autograd functions, which makes torch warn.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_compiled_memory_and_gradients_are_the_same() -> None:
    torch._dynamo.reset()
    x_BCHW = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    layers: list[nn.Module] = [nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), ReLU6(), nn.Conv2d(16, 8, 1), ReLU6()]
    network = nn.Sequential(*layers)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    # A compiled network keeps a few numbers per channel in other tensors. Copies of inputs would be half as much again.
    assert saved_bytes(network, compiled, x_BCHW) < 1.05 * saved_bytes(network, network, x_BCHW)
    gradients = []
    for run in (network, compiled):
        network.zero_grad()
        run(x_BCHW).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other)


def test_exporters_see_torchs_operator() -> None:
    program = torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 1), ReLU6()), (torch.randn(2, 3, 8, 8),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert len(names) == 2 and any(word in names[1] for word in ("relu6", "hardtanh"))


def test_build_network_replaces_all_of_them() -> None:
    with torch.device("meta"):
        network = build_network("mobilenet_v2", 5)
    found = [module for module in network.modules() if isinstance(module, nn.ReLU6)]
    assert len(found) == 35 and all(isinstance(module, ReLU6) for module in found)

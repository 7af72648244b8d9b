"""What a training step takes of a process: memory, and the messages of batch norm.

Counted on tensors that have shapes and no values, so that no GPU is needed and nothing is computed.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distributed.backends.base import Group
from distributed.backends.single import SingleBackend
from distributed.batch_norm.layer import convert_batch_norm
from distributed.topology import Topology
from training.build.model import network_of
from training.build.normalise import Normaliser
from training.build.numerics import autocast, place_network
from training.config.schema import Config
from training.optim.ema import EMA
from training.optim.lars import Lars
from training.optim.optimizers import make_optimizer
from training.recipe import Execution
from training.runs.resume import state_tensors
from tsm.networks import TemporalNetwork

LEFT_OUT = (
    "CUDA's context, workspaces of cuDNN and cuBLAS, blocks that the allocator keeps, buffers of NCCL, DDP or Horovod, "
    "evaluation"
)


@dataclass(frozen=True)
class StepCosts:
    """Of one process. Bytes of memory are those of its tensors; what LEFT_OUT names comes on top."""

    weights_bytes: int
    """Parameters and running statistics."""
    gradients_bytes: int
    optimizer_bytes: int
    """Its state, and the weights' moving average where there is one."""
    peak_bytes: int
    """The most at any moment of a step, everything in it."""
    checkpoint_bytes: int
    """Tensors in the files of a checkpoint."""
    bn_messages: int
    """All-reduces of batch norm in a step, over the ranks of its groups."""
    bn_message_bytes: int
    """What the process contributes to them, together."""


def step_costs(config: Config, execution: Execution) -> StepCosts:
    """Follow a micro-step of one process, forward and backward, by the shapes of its tensors.

    Autocast for CPUs stands for CUDA's: both run convolutions and the classifier in the lower precision. The update comes when
    the activations are gone, so that of the optimizer its state alone counts. Raises ConfigError as `network_of` does.
    """
    messages = _MessageCounter()
    with torch.device("meta"):
        network = network_of(config.model, config.data.num_classes)
        convert_batch_norm(network, messages, execution.bn_ghosts, execution.bn_rank_groups(), execution.accumulation)
        place_network(network, torch.device("meta"), config.numerics)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        network.to_empty(device="cpu")
        live.hold(network.state_dict(keep_vars=True).values())
        weights_bytes = live.now
        optimizer, decay = make_optimizer(network, config.optimizer), config.optimizer.ema_decay
        average = None if decay is None else EMA(network, decay)
        optimizer_bytes = live.now - weights_bytes
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        gradients_bytes = sum(parameter.nbytes for parameter in trained)
        if execution.accumulation > 1:  # those of earlier micro-steps
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        _forward_and_backward(config, network, execution.micro_batch)
        saved = [*network.state_dict().values(), *state_tensors(network, optimizer, average).values()]
        checkpoint_bytes = sum(tensor.nbytes for tensor in saved)
        # Where LARS runs on GPUs, its buffer holds the gradients a second time.
        copied_bytes = gradients_bytes if isinstance(optimizer, Lars) else 0
    return StepCosts(
        weights_bytes=weights_bytes,
        gradients_bytes=gradients_bytes,
        optimizer_bytes=optimizer_bytes + copied_bytes,
        peak_bytes=live.peak + copied_bytes,
        checkpoint_bytes=checkpoint_bytes,
        bn_messages=messages.count * execution.accumulation,
        bn_message_bytes=messages.size_bytes * execution.accumulation,
    )


class _MessageCounter(SingleBackend):
    """Counts what a process would send."""

    def __init__(self) -> None:
        super().__init__(Topology("none", 0, 1, 0, 1, 0, "localhost"), torch.device("cpu"))
        self.count = 0
        self.size_bytes = 0

    def all_reduce_(self, x: Tensor, name: str, group: Group | None = None) -> None:
        self.count += 1
        self.size_bytes += x.nbytes


def _forward_and_backward(config: Config, network: TemporalNetwork, clips: int) -> None:
    """What training.step does with a micro-batch, dropout's masks apart: they are numbers for each clip, not tensors of weight."""
    size, cpu = config.pipeline.size, torch.device("cpu")
    video_NTCHW = torch.empty(clips, config.model.num_frames, 3, size, size, dtype=torch.uint8)
    label_N = torch.zeros(clips, dtype=torch.int64)
    x_NTCHW = Normaliser(cpu, config.numerics)(video_NTCHW)
    with autocast(cpu, config.numerics.amp):
        loss = torch.nn.functional.cross_entropy(network(x_NTCHW), label_N)
    loss.backward()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it: those that live `now`, and the most that ever did at once, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors until their memory is freed; views of what is counted already add nothing."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size_bytes = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.now += size_bytes
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._release, key, size_bytes)

    def _release(self, key: int, size_bytes: int) -> None:
        self._known.remove(key)
        self.now -= size_bytes

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.device.type != "meta")
        return result

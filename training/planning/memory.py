"""Estimate the memory of a training step, and its messages of batch norm.

Counts fake tensors, which have shapes and no values, so it needs no GPU and computes nothing.
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
from pipelines.stream.burn_in import StreamSampling
from training.build.model import network_of
from training.build.normalise import Normaliser
from training.build.numerics import autocast, place_network
from training.config.schema import ModelConfig, NumericsConfig, OptimizerConfig
from training.loss import clip_loss
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
    """Costs of a step for one process. Memory is that of tensors; what LEFT_OUT names is not included."""

    weights_bytes: int
    """Parameters and running statistics."""
    gradients_bytes: int
    optimizer_bytes: int
    """Its state, and the EMA of the weights if there is one."""
    peak_bytes: int
    """Peak of all tensors within a step."""
    checkpoint_bytes: int
    """Size of the tensors in a checkpoint."""
    bn_messages: int
    """All-reduces of batch norm per step, over the ranks of its groups."""
    bn_message_bytes: int
    """Bytes that the process contributes to them."""


def step_costs(
    model: ModelConfig,
    num_classes: int,
    size: int,
    numerics: NumericsConfig,
    optimizer_config: OptimizerConfig,
    execution: Execution,
    stream: StreamSampling | None = None,
) -> StepCosts:
    """Run forward and backward of a micro-step on fake tensors, with frames of `size` pixels, and count the tensors.

    CPU autocast stands for CUDA's: both run convolutions and the classifier in the lower precision. The optimizer's update runs
    after the activations are freed, so only its state counts. Raises ConfigError as `network_of` does.
    """
    messages = _MessageCounter()
    with torch.device("meta"):
        network = network_of(model, num_classes)
        convert_batch_norm(network, messages, execution.bn_ghosts, execution.bn_rank_groups(), execution.accumulation)
        place_network(network, torch.device("meta"), numerics)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        network.to_empty(device="cpu")
        live.hold(network.state_dict(keep_vars=True).values())
        weights_bytes = live.now
        optimizer, decay = make_optimizer(network, optimizer_config), optimizer_config.ema_decay
        average = None if decay is None else EMA(network, decay)
        optimizer_bytes = live.now - weights_bytes
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        gradients_bytes = sum(parameter.nbytes for parameter in trained)
        # Gradients of earlier micro-steps.
        if execution.accumulation > 1:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        frames = model.num_frames + (stream.burn_in if stream else 0)
        video_NTCHW = torch.empty(execution.micro_batch, frames, network.in_channels, size, size, dtype=torch.uint8)
        _forward_and_backward(network, video_NTCHW, numerics, stream)
        saved = [*network.state_dict().values(), *state_tensors(network, optimizer, average).values()]
        checkpoint_bytes = sum(tensor.nbytes for tensor in saved)
        # On GPUs the buffer of LARS holds a second copy of the gradients.
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
    """Counts the messages of one process, and sends nothing."""

    def __init__(self) -> None:
        super().__init__(Topology("none", 0, 1, 0, 1, 0, "localhost"), torch.device("cpu"))
        self.count = 0
        self.size_bytes = 0

    def all_reduce_(self, x: Tensor, name: str, group: Group | None = None) -> None:
        self.count += 1
        self.size_bytes += x.nbytes


def _forward_and_backward(
    network: TemporalNetwork, video_NTCHW: Tensor, numerics: NumericsConfig, stream: StreamSampling | None = None
) -> None:
    """Do what training.step does with a micro-batch, without dropout's masks, which are small."""
    cpu = torch.device("cpu")
    label_N = torch.zeros(len(video_NTCHW), dtype=torch.int64)
    x_NTCHW = Normaliser(cpu, numerics, network.modality)(video_NTCHW)
    with autocast(cpu, numerics.amp):
        loss, _ = clip_loss(network, x_NTCHW, label_N, label_N, stream)
    loss.backward()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it: `now`, and at their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors until their memory is freed. Views of counted memory add nothing."""
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

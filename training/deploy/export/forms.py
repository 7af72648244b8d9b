"""The two forms in which a network is exported, as modules whose inputs and outputs are named tensors.

`stream` takes one frame and the caches of a past-only network (tsm/streaming.py); `clip` takes all frames of a clip. The first
dimension of every input and output is N, the number of streams or clips.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import ConfigError
from tsm.networks import TemporalNetwork
from tsm.streaming import StreamingNetwork, streaming_network

FORMS = ("stream", "clip")

Files = dict[str, bytes]
"""Content of each file of an export by name."""


@dataclass(frozen=True)
class Exportable:
    """A float32 network in evaluation mode on the CPU, in one form."""

    form: str
    module: nn.Module
    """Takes the inputs, in order, and returns the outputs as a tuple."""
    inputs: dict[str, tuple[int, ...]]
    """Shape of each input by name, without N."""
    outputs: dict[str, tuple[int, ...]]
    size: int
    """Height and width of frames, in pixels."""
    num_frames: int
    """Frames in a call: those of a clip; 1 for a stream."""
    modality: str
    """rgb or flow; gives the channels of a frame."""
    cache_modules: tuple[str, ...] = ()
    """The module whose input each cache belongs to."""

    def zeros(self, batch: int) -> list[Tensor]:
        """Return the inputs as zeros. For caches they are the values before a stream's first frame."""
        return [torch.zeros(batch, *shape) for shape in self.inputs.values()]

    @torch.no_grad()
    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Compute the outputs with PyTorch."""
        return list(self.module(*inputs))

    def program(self, batch: int | None) -> torch.export.ExportedProgram:
        """Trace the module with torch.export; `batch`: the only N that the program takes, None: any."""
        dims = None if batch else {0: torch.export.Dim("N", min=1)}
        shapes: dict[str, Any] = {"x_NTCHW": dims}
        if self.form == "stream":
            # Without caches (TSN) torch.export knows no argument of this name.
            shapes = {"frame": dims} | ({"caches": (dims,) * len(self.cache_modules)} if self.cache_modules else {})
        # Traced with a batch of 2: torch.export takes sizes of 1 for constants.
        arguments = tuple(self.zeros(batch or 2))
        return torch.export.export(self.module, arguments, dynamic_shapes=shapes)


def exportable(network: TemporalNetwork, form: str, size: int) -> Exportable:
    """Return a copy of the network in this form for frames of `size` x `size` pixels.

    Raises ConfigError if the network has no streaming form.
    """
    network = copy.deepcopy(network).to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()
    logits, frame = (network.classifier.out_features,), (network.in_channels, size, size)
    if form == "clip":
        frames = network.num_frames
        clip: dict[str, tuple[int, ...]] = {"clip": (frames, *frame)}
        return Exportable(form, _Clip(network), clip, {"logits": logits}, size, frames, network.modality)
    try:
        streaming = streaming_network(network)
    except ValueError as error:
        raise ConfigError(f"form=stream: {error}, or export whole clips: form=clip") from error
    caches = [tuple(cache.shape[1:]) for cache in streaming.initial_caches(1, (size, size))]
    inputs = {"frame": frame} | {f"cache_{index}": shape for index, shape in enumerate(caches)}
    outputs = {"logits": logits} | {f"next_cache_{index}": shape for index, shape in enumerate(caches)}
    return Exportable(form, _Stream(streaming), inputs, outputs, size, 1, network.modality, streaming.cache_names)


class _Stream(nn.Module):
    """A streaming network with its caches as single arguments and results: runtimes have no tuples."""

    def __init__(self, network: StreamingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, frame: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        logits, caches = self.network.stream(frame, caches)
        return (logits, *caches)


class _Clip(nn.Module):
    def __init__(self, network: TemporalNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_NTCHW: Tensor) -> tuple[Tensor]:
        return (self.network(x_NTCHW),)

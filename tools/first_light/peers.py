"""The same training step without the project's code: a plain torch loop, a CUDA graph, torch.compile."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.shift import ShiftFunction

from .report import Results
from .settings import Settings, Shape
from .shifts import SHIFTS, WITHOUT_TRITON, without_triton
from .steps import CLASSES, Way, set_switches
from .timing import free_memory, time_steps

MEAN_C, STD_C = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Shifted(nn.Module):
    """A convolution that shifts its input first; input and output are batches of frames."""

    def __init__(self, convolution: nn.Module, shift: ShiftFunction, frames: int) -> None:
        super().__init__()
        self.convolution, self.shift, self.frames = convolution, shift, frames

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_NTCHW = x_BCHW.unflatten(0, (-1, self.frames))
        shifted: Tensor = self.convolution(self.shift(x_NTCHW).flatten(0, 1))
        return shifted


def bare_network(shape: Shape, shift: str, device: str) -> nn.Module:
    """Return torchvision's ResNet with a shift before the first convolution of each residual block."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, shape.backbone)(num_classes=CLASSES)
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for block in stage:
            if shift != "none":
                block.conv1 = Shifted(block.conv1, SHIFTS[shift], shape.frames)
    return network.to(device, memory_format=torch.channels_last).train()


class BareLoop:
    """A plain torch training step: pinned clips to the device, bf16 autocast, fused SGD, and no more."""

    def __init__(self, network: nn.Module, shape: Shape, device: str) -> None:
        self.network = network
        self._frames, self._device = shape.frames, device
        self._optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, fused=True)
        generator = torch.Generator().manual_seed(1)
        batch = (shape.clips * shape.frames, 3, shape.size, shape.size)
        self._frames_BCHW = torch.randint(256, batch, dtype=torch.uint8, generator=generator)
        self._label_N = torch.randint(CLASSES, (shape.clips,), generator=generator)
        if device == "cuda":
            self._frames_BCHW, self._label_N = self._frames_BCHW.pin_memory(), self._label_N.pin_memory()
        self._mean_C11, self._std_C11 = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN_C, STD_C))

    def frames(self) -> Tensor:
        """Return normalised frames on the device."""
        frames_BCHW = self._frames_BCHW.to(self._device, non_blocking=True, memory_format=torch.channels_last)
        return frames_BCHW.float().sub_(self._mean_C11).div_(self._std_C11)

    def step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        label_N = self._label_N.to(self._device, non_blocking=True)
        with torch.autocast(self._device, torch.bfloat16):
            logit_NK = self.network(self.frames()).unflatten(0, (-1, self._frames)).mean(1)
            loss = nn.functional.cross_entropy(logit_NK, label_N)
        loss.backward()
        self._optimizer.step()


def peers(results: Results) -> None:
    """Measure plain loops with each shift, eager and with forward and backward pass as CUDA graphs."""
    settings = results.settings
    set_switches(Way())
    graphs = {f"CUDA graph, shift: {name}": (name, graphed) for name in ("ours", "none")}
    cases = {f"bare loop, shift: {name}": (name, eager) for name in ("ours", "none")}
    cases |= graphs if settings.device == "cuda" else {}
    cases |= {f"bare loop, shift: {name}": (name, eager) for name in SHIFTS}
    for title, (shift, change) in results.each(cases):
        if change is graphed and settings.mode == "fake":
            with results.row(title) as row:
                row["skipped"] = "the fake GPU captures no graphs"
        else:
            measure(results, title, shift, change)


def compiled(results: Results) -> None:
    """Measure the plain loop under torch.compile; compilation takes most of the time, so this phase is the last."""
    set_switches(Way())
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(results.settings.work / "inductor")
    change = with_compiled_block if results.settings.tiny else with_compiled_network
    for title, shift in results.each({f"torch.compile, shift: {name}": name for name in ("ours", "none")}):
        measure(results, title, shift, change)


def measure(results: Results, title: str, shift: str, change: Callable[[BareLoop], BareLoop]) -> None:
    settings = results.settings
    with results.row(title) as row, without_triton(shift == WITHOUT_TRITON):
        row |= time_loop(settings, shift, change)
    free_memory(settings.device)


def time_loop(settings: Settings, shift: str, change: Callable[[BareLoop], BareLoop]) -> dict[str, Any]:
    shape = settings.shape
    loop = change(BareLoop(bare_network(shape, shift, settings.device), shape, settings.device))
    return time_steps(loop.step, shape.clips, settings.device, settings.tiny)


def eager(loop: BareLoop) -> BareLoop:
    return loop


def graphed(loop: BareLoop) -> BareLoop:
    """Turn the network's forward and backward pass into one CUDA graph each, including the casts of weights."""
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        loop.network = torch.cuda.make_graphed_callables(loop.network, (loop.frames(),))  # type: ignore[assignment]
    return loop


def with_compiled_network(loop: BareLoop) -> BareLoop:
    loop.network = torch.compile(loop.network)  # type: ignore[assignment]
    return loop


def with_compiled_block(loop: BareLoop) -> BareLoop:
    """Compile only one residual block: a whole network takes minutes on a CPU."""
    stage = loop.network.get_submodule("layer1")
    assert isinstance(stage, nn.Sequential)
    stage[0] = torch.compile(stage[0])  # type: ignore[assignment]
    return loop
